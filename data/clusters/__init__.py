"""A user's own cells: clusters as mean profiles, labels written back onto cells, and the labels that a model knows."""
