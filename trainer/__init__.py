"""GRPO. The files of a training step are here; the inner rooms have the model, the ranks, start-up, records and SFT."""

import logging

# importing bitsandbytes prints a warning about an optional kernel on CPUs with AVX-512
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
