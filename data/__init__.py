"""Single-cell data: puzzles, prompts, the .h5ad builder, the simulated atlas, distillation. Imports no other room."""
