"""Triton kernels for a GPU: what lies between the matrix products of a model, in fewer passes over memory."""
