import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several test processes run at once

import pytest
import torch
from hypothesis import settings

settings.register_profile("steady", derandomize=True, deadline=None)  # the same examples in every run
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))


@pytest.fixture(scope="session", autouse=True)
def _separate_latency_cache(tmp_path_factory):
    """Use a latency cache of this session only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GHOSTIFY_CACHE", str(tmp_path_factory.mktemp("latencies")))
        yield


@pytest.fixture(autouse=True)
def _seed():
    """Give every test the same random networks, independent of the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _reset_accelerator():
    """Reset the state of Accelerate, whose precision otherwise holds for the whole process."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)
