"""The whole story as one run: launch/demo.py."""
