"""What a run leaves on disk: its folder, step bundles, and the first value that is not finite."""
