import pytest
import torch

torch.set_num_threads(1)  # sums in one order: the tests repeat bit for bit


@pytest.fixture(autouse=True)
def _same_random_numbers():
    """Let every test see the same random numbers, alone or in the suite."""
    torch.manual_seed(0)
