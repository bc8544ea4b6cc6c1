"""A simulated single-cell atlas, and the table of marker genes from which it is made."""
