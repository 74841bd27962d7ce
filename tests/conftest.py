"""Settings of the test run: one thread, and a hypothesis profile that is the same everywhere."""

import torch
from hypothesis import settings

settings.register_profile("thalweg", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("thalweg")
torch.set_num_threads(1)
