"""Shared by all tests."""

import torch

# Tiny tensors gain nothing from threads, and lose a factor of ten when several test processes share the cores.
torch.set_num_threads(1)
