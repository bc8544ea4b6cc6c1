"""Advantages, objective, log-probs, packing, policy, checkpoints, and the loops that use them."""

import logging

# importing it prints a warning about an optional kernel on CPUs with AVX-512
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
