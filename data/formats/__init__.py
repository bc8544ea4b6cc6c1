"""Kinds of files: what is no .h5ad and how to make one of it, zarr stores, HDF5 filters."""
