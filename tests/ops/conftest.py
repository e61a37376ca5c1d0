"""Op tests run with freshly allocated memory full of NaN, so that a read of it cannot pass unnoticed."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _nan_filled_memory():
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
