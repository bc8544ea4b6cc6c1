"""What a file of cells holds, and the command that builds puzzles from it."""
