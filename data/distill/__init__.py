"""Reasoning traces from a teacher, by rejection sampling."""
