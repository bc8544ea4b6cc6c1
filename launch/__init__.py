"""Thin click commands, one file per verb, and the recipes they read."""

import os

# torch reads this when it loads; its note on NUMA binding, once per process, helps nobody here
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
