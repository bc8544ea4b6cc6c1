"""Configurations of a training compared: launch/ablate.py."""
