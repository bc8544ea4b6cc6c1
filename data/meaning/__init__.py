"""What a table means: which values are missing, which labels are cell types, which rows are genes, which values counts.

The files beside this folder say how a table is stored; these say what its content stands for.
"""
