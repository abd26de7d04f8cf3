import os
from pathlib import Path

import pytest
import torch

# Processes that tests start import the helpers, and networks that configs name, from here.
HERE = Path(__file__).parent
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(HERE), str(HERE / "helpers"), os.environ.get("PYTHONPATH")))
)

torch.set_num_threads(1)  # sums in one order: the tests repeat bit for bit


@pytest.fixture(autouse=True)
def _same_random_numbers():
    """Let every test see the same random numbers, alone or in the suite."""
    torch.manual_seed(0)
