"""Rejection sampling of reasoning traces from a teacher."""
