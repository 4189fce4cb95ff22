import os

import pytest
import torch
from hypothesis import settings

settings.register_profile("steady", derandomize=True, deadline=None)  # the same examples in every run
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))


@pytest.fixture(autouse=True)
def _seed():
    """Every test meets the same random networks, whatever ran before it."""
    torch.manual_seed(0)
