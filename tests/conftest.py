import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes of tests run beside each other

import pytest
import torch
from hypothesis import settings

settings.register_profile("steady", derandomize=True, deadline=None)  # the same examples in every run
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))


@pytest.fixture(scope="session", autouse=True)
def _own_latencies(tmp_path_factory):
    """Latencies measured before, or by another process of tests, decide nothing here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GHOSTIFY_CACHE", str(tmp_path_factory.mktemp("latencies")))
        yield


@pytest.fixture(autouse=True)
def _seed():
    """Every test meets the same random networks, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_accelerator_left():
    """Accelerate keeps its precision for the whole process, other tests among it."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)
