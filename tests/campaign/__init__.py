"""The campaign: programs that look for hours for what nobody thought of. See README.md."""
