"""Thin click commands, one file per verb, and the recipes they read."""
