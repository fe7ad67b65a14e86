"""What the tests share: models, Trainers, folders to work in, the reference to hold the code against."""

import os
from pathlib import Path


ROOT = Path(__file__).parents[2]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny models gain nothing from threads, and tests that compare bits want one order of summation.
os.environ.setdefault("OMP_NUM_THREADS", "1")
