"""GRPO. The files of a training step are here; the inner rooms have the model, the ranks, start-up, records and SFT."""

import logging
import os

# importing bitsandbytes prints a warning about an optional kernel on CPUs with AVX-512
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# read at the first tensor: those of 2 MB and more in main memory lie in huge pages, and are faulted in 512 times less often
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", str(int(os.path.exists("/sys/kernel/mm/transparent_hugepage"))))
