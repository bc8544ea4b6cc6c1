"""Which prompts a run asks: the batches of its steps, and held-out puzzles for validation."""
