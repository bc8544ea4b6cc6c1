"""From .h5ad files to puzzles."""
