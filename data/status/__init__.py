"""What a command tells its owner."""
