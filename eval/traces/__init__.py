"""Reading the reasoning of a response."""
