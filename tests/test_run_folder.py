import json

import pytest
import torch

from ghostify import GhostifyError
from ghostify.training.run_folder import METRICS, RunFolder, TrainingProgress, metrics_of


class Accelerator:
    """As far as records know it: saves one number."""

    def __init__(self, value=0):
        self.value, self.fail = value, False

    def wait_for_everyone(self):
        pass

    def save_state(self, folder):
        with open(f"{folder}/value", "w") as file:
            file.write(str(self.value))
        if self.fail:
            raise KeyboardInterrupt

    def load_state(self, folder):
        with open(f"{folder}/value") as file:
            self.value = int(file.read())


FACTS = {"epochs": 2, "images": 5}


def test_a_state_is_kept_whole_and_the_one_before_goes(tmp_path):
    records, kept = RunFolder(tmp_path, FACTS, main=True), Accelerator(7)
    assert records.resume(kept) == TrainingProgress()
    records.log_metrics(1, {"loss": 1.0})
    records.save(kept, TrainingProgress(2, best=50.0, distance_to_original=0.1, evaluations_without_gain=1))
    records.log_metrics(3, {"loss": 0.5})
    kept.value, kept.fail = 8, True
    with pytest.raises(KeyboardInterrupt):
        records.save(kept, TrainingProgress(4))
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 4, "lo')
    again, found = RunFolder(tmp_path, FACTS, main=True), Accelerator()
    assert again.resume(found) == TrainingProgress(2, best=50.0, distance_to_original=0.1, evaluations_without_gain=1)
    assert found.value == 7
    assert metrics_of(tmp_path) == [{"step": 1, "loss": 1.0}]
    again.save(Accelerator(9), TrainingProgress(4))
    again.save(Accelerator(9), TrainingProgress(4))
    assert [p.name for p in tmp_path.glob("state-*")] == ["state-000000004"]


def test_the_best_weights_are_the_last_that_were_kept(tmp_path):
    records, shared = RunFolder(tmp_path, FACTS, main=True), torch.arange(3.0)
    for scale in (1, 2):
        records.save_best({"a": scale * shared, "b": (scale * shared).expand(2, 3)})
    assert torch.equal(records.best()["b"], (2 * shared).expand(2, 3))


def test_only_the_main_process_writes(tmp_path):
    other = RunFolder(tmp_path / "none", FACTS, main=False)
    other.log_metrics(1, {"loss": 1.0})
    other.save_best({})
    assert not (tmp_path / "none").exists()


def test_folders_of_others_are_refused(tmp_path):
    RunFolder(tmp_path / "t", FACTS, main=True)
    with pytest.raises(GhostifyError, match="holds a training of other images"):
        RunFolder(tmp_path / "t", {**FACTS, "images": 6}, main=True)
    assert json.loads((tmp_path / "t" / "training.json").read_text()) == FACTS
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.png").touch()
    with pytest.raises(GhostifyError, match="holds something else"):
        RunFolder(tmp_path / "mine", FACTS, main=True)
