"""A short run of `tests/kill_writers.py`, whose long run is `make test-kills`."""

import pytest
import torch

from tests.kill_writers import Trial, is_failure, run_trials, table


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_ten_kills_of_save_lose_nothing(tmp_path):
    trials = run_trials(["save"], 10, 0, tmp_path, accesses_only=True)
    assert [trial for trial in trials if is_failure(trial)] == []
    assert {trial.outcome for trial in trials} == {"old", "new"}


def test_losses_and_problems_are_failures_and_are_counted():
    trials = [Trial("save", "time", "SIGKILL", "old", ()), Trial("save", "time", "SIGKILL", "lost", ())]
    assert [is_failure(trial) for trial in trials] == [False, True]
    assert is_failure(Trial("save", "time", "SIGKILL", "new", ("a file is left",)))
    assert table(trials).splitlines()[1].split() == ["save", "time", "SIGKILL", "1", "0", "1"]
