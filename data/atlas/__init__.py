"""A simulated single-cell atlas, and the marker table that it is made from."""
