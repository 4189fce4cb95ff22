import json
import os
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ghostify import GhostifyError
from ghostify.io.atomic import _staging_place
from ghostify.training.run_folder import METRICS, PROGRESS, RunFolder, TrainingProgress, check_run_folder, metrics_of


class Accelerator:
    """The part of Accelerate that a run folder uses; its state is one number."""

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


SETTINGS = {"epochs": 2, "images": 5}


def test_a_state_is_saved_completely_and_the_previous_one_is_removed(tmp_path):
    run_folder, accelerator = RunFolder(tmp_path, SETTINGS, is_main=True), Accelerator(7)
    assert run_folder.resume(accelerator) == TrainingProgress()
    progress = TrainingProgress(2, best=50.0, distance_to_original=0.1, evaluations_without_gain=1)
    run_folder.log_metrics(1, {"loss": 1.0})
    run_folder.save_best({"a": torch.zeros(2)})
    run_folder.save(accelerator, progress)
    run_folder.log_metrics(3, {"loss": 0.5})
    accelerator.value, accelerator.fail = 8, True
    with pytest.raises(KeyboardInterrupt):
        run_folder.save(accelerator, TrainingProgress(4))
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 4, "lo')
    run_folder.close()
    assert [entry["step"] for entry in metrics_of(tmp_path)] == [1, 3]
    _staging_place(tmp_path / "state-000000002").mkdir()  # as after a kill
    resumed, accelerator = RunFolder(tmp_path, SETTINGS, is_main=True), Accelerator()
    assert resumed.resume(accelerator) == progress
    assert not _staging_place(tmp_path / "state-000000002").exists()
    assert accelerator.value == 7
    assert metrics_of(tmp_path) == [{"step": 1, "loss": 1.0}]
    resumed.save(Accelerator(9), TrainingProgress(4))
    resumed.save(Accelerator(9), TrainingProgress(4))
    assert [p.name for p in tmp_path.glob("state-*")] == ["state-000000004"]


def write_run_of_earlier_version(folder, progress):
    """A run folder as versions before the format-2 checkpoints wrote it."""
    state = folder / "state-000000004"
    state.mkdir(parents=True)
    (folder / "training.json").write_text(json.dumps(SETTINGS))
    lines = [{"step": 2, "loss": 0.5}, {"step": 4, "validation": 62.5, "apart": 0.125}, {"step": 5, "loss": 0.25}]
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (state / "value").write_text("7")
    save_file({}, folder / "best.safetensors")
    (state / PROGRESS).write_text(json.dumps(progress))


def test_a_folder_of_an_earlier_version_is_resumed_and_rewritten_with_the_present_keys(tmp_path):
    write_run_of_earlier_version(tmp_path, {"step": 4, "best": 62.5, "apart": 0.125, "stale": 3})
    evaluation = {"step": 4, "validation": 62.5, "distance_to_original": 0.125}
    assert metrics_of(tmp_path)[1] == evaluation
    run_folder, accelerator = RunFolder(tmp_path, SETTINGS, is_main=True), Accelerator()
    progress = run_folder.resume(accelerator)
    assert progress == TrainingProgress(4, best=62.5, distance_to_original=0.125, evaluations_without_gain=3)
    assert accelerator.value == 7
    lines = (tmp_path / METRICS).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 2, "loss": 0.5}, evaluation]
    run_folder.save(accelerator, replace(progress, step=5))
    stored = json.loads((tmp_path / "state-000000005" / PROGRESS).read_text())
    assert stored == {"step": 5, "best": 62.5, "distance_to_original": 0.125, "evaluations_without_gain": 3}


def test_a_state_with_unknown_keys_is_refused_in_one_line(tmp_path):
    write_run_of_earlier_version(tmp_path, {"step": 4, "best": 62.5, "momentum": 0.9})
    with pytest.raises(GhostifyError, match=r"progress\.json: progress: has an unknown field 'momentum'") as caught:
        RunFolder(tmp_path, SETTINGS, is_main=True).resume(Accelerator())
    assert "\n" not in str(caught.value)


def test_damaged_settings_are_refused_by_name(tmp_path):
    (tmp_path / "training.json").write_text('{"epochs"')
    with pytest.raises(GhostifyError, match=r"training\.json: is truncated or not JSON"):
        RunFolder(tmp_path, SETTINGS, is_main=True)


@pytest.mark.parametrize("progress", [{"step": "4"}, {"step": 1, "best": [1]}, {"step": 1.5}])
def test_a_state_of_other_values_is_refused(tmp_path, progress):
    write_run_of_earlier_version(tmp_path, progress)
    with pytest.raises(GhostifyError, match=r"progress\.json: progress: "):
        RunFolder(tmp_path, SETTINGS, is_main=True).resume(Accelerator())


@pytest.mark.parametrize("line", ["[1]", '{"loss": 1.0}', '{"step": "x"}', '{"step": 1, "loss": [1]}'])
def test_metrics_of_other_kinds_are_refused(tmp_path, line):
    (tmp_path / METRICS).write_text(f'{{"step": 1, "loss": NaN}}\n{line}\n')
    with pytest.raises(GhostifyError, match=r"metrics\.jsonl: has a line that is not of a training run"):
        metrics_of(tmp_path)


class Pickled:
    def __reduce__(self):
        return print, ("it has run",)


def test_a_state_is_read_without_running_code(tmp_path, capsys):
    write_run_of_earlier_version(tmp_path, {"step": 4})
    torch.save({"a": torch.ones(1)}, tmp_path / "state-000000004/custom_checkpoint_0.pkl")
    assert RunFolder(tmp_path, SETTINGS, is_main=True).resume(Accelerator()).step == 4
    torch.save({"a": Pickled()}, tmp_path / "state-000000004/custom_checkpoint_0.pkl")
    with pytest.raises(GhostifyError, match=r"custom_checkpoint_0\.pkl: is damaged, or cannot be read without running"):
        RunFolder(tmp_path, SETTINGS, is_main=True).resume(Accelerator())
    assert "it has run" not in capsys.readouterr().out


def test_a_state_with_a_pipe_is_refused(tmp_path):
    write_run_of_earlier_version(tmp_path, {"step": 4})
    os.mkfifo(tmp_path / "state-000000004/model.safetensors")
    with pytest.raises(GhostifyError, match=r"model\.safetensors: is a pipe"):
        RunFolder(tmp_path, SETTINGS, is_main=True).resume(Accelerator())


def test_best_weights_that_are_missing_are_named(tmp_path):
    with pytest.raises(GhostifyError, match=r"best\.safetensors: cannot be read"):
        RunFolder(tmp_path, SETTINGS, is_main=True).load_best()


def test_the_best_weights_are_the_last_that_were_saved(tmp_path):
    run_folder, shared = RunFolder(tmp_path, SETTINGS, is_main=True), torch.arange(3.0)
    for scale in (1, 2):
        run_folder.save_best({"a": scale * shared, "b": (scale * shared).expand(2, 3)})
    assert torch.equal(run_folder.load_best()["b"], (2 * shared).expand(2, 3))


def test_a_folder_of_the_users_with_a_similar_name_and_notes_in_a_state_stay(tmp_path):
    run_folder = RunFolder(tmp_path, SETTINGS, is_main=True)
    (tmp_path / "state-backup1").mkdir()
    run_folder.save(Accelerator(1), TrainingProgress(1))
    (tmp_path / "state-000000001" / "notes.txt").write_text("mine")
    run_folder.save(Accelerator(2), TrainingProgress(2))
    assert (tmp_path / "state-000000001" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "state-backup1").exists()
    run_folder.close()
    resumed, accelerator = RunFolder(tmp_path, SETTINGS, is_main=True), Accelerator()
    assert resumed.resume(accelerator) == TrainingProgress(2)
    assert accelerator.value == 2


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("state-000000002/value", "8", r"state-000000002/value: is missing or damaged"),
        ("state-000000002/value", None, r"state-000000002/value: is missing or damaged"),
        ("state-000000002/progress.json", "{", r"progress\.json: is missing or damaged"),
        ("state-000000002/progress.json", '{"step": "2"}', r"progress\.json: is missing or damaged"),
        ("best.safetensors", "x", r"best\.safetensors: is damaged or not a safetensors file"),
        ("best.safetensors", None, r"best\.safetensors: cannot be read"),
    ],
)
def test_damaged_files_are_named_in_one_line_before_training_goes_on(tmp_path, name, text, named):
    run_folder = RunFolder(tmp_path, SETTINGS, is_main=True)
    run_folder.save_best({"a": torch.zeros(2)})
    run_folder.save(Accelerator(7), TrainingProgress(2, best=50.0))
    run_folder.close()
    (tmp_path / name).unlink() if text is None else (tmp_path / name).write_text(text)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    resumed = RunFolder(tmp_path, SETTINGS, is_main=True)
    with pytest.raises(GhostifyError, match=named) as caught:
        resumed.resume(Accelerator())
    assert "\n" not in str(caught.value)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_values_that_are_not_finite_and_half_a_line_are_left_out_of_the_metrics(tmp_path):
    lines = ['{"step": 1, "loss": 1.0}', '{"step": 2, "loss": NaN, "validation": 50.0}', '{"step": 3, "lo']
    (tmp_path / METRICS).write_text("\n".join(lines))
    assert metrics_of(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "validation": 50.0}]


@pytest.mark.parametrize(
    "error",
    [RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos"), SafetensorError("I/O")],
)
def test_a_disk_that_is_full_while_the_state_is_written_keeps_the_previous_one(tmp_path, error):
    run_folder, accelerator = RunFolder(tmp_path, SETTINGS, is_main=True), Accelerator(7)
    run_folder.save(accelerator, TrainingProgress(2))

    def fail(_):
        raise error

    accelerator.save_state = fail
    with pytest.raises(GhostifyError, match="state-000000004: cannot be written"):
        run_folder.save(accelerator, TrainingProgress(4))
    run_folder.close()
    resumed, accelerator = RunFolder(tmp_path, SETTINGS, is_main=True), Accelerator()
    assert resumed.resume(accelerator) == TrainingProgress(2)
    assert accelerator.value == 7


def test_a_run_that_ends_before_its_first_state_leaves_nothing(tmp_path):
    run_folder = RunFolder(tmp_path / "t", SETTINGS, is_main=True)
    run_folder.resume(Accelerator())
    run_folder.log_metrics(1, {"loss": 1.0})
    run_folder.save_best({"a": torch.zeros(2)})
    run_folder.discard_start()
    run_folder.close()
    assert not list(tmp_path.iterdir())


def test_a_run_with_a_state_keeps_its_folder(tmp_path):
    run_folder = RunFolder(tmp_path, SETTINGS, is_main=True)
    run_folder.save(Accelerator(7), TrainingProgress(2))
    files = {*tmp_path.rglob("*")}
    run_folder.discard_start()
    assert {*tmp_path.rglob("*")} == files


def test_other_errors_while_the_state_is_written_are_not_hidden(tmp_path):
    run_folder, accelerator = RunFolder(tmp_path, SETTINGS, is_main=True), Accelerator(7)

    def fail(_):
        raise RuntimeError("a mistake of ours")

    accelerator.save_state = fail
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        run_folder.save(accelerator, TrainingProgress(2))


def test_two_runs_in_one_folder_at_once_are_refused(tmp_path):
    run_folder = RunFolder(tmp_path / "t", SETTINGS, is_main=True)
    with pytest.raises(GhostifyError, match="t: another process is writing it"):
        RunFolder(tmp_path / "t", SETTINGS, is_main=True)
    run_folder.close()
    RunFolder(tmp_path / "t", SETTINGS, is_main=True).close()


@pytest.mark.parametrize("damage", ["{", "[]", "3"])
def test_a_damaged_record_is_named_before_anything_is_written(tmp_path, damage):
    RunFolder(tmp_path / "t", SETTINGS, is_main=True).close()
    (tmp_path / "t" / "training.json").write_text(damage)
    with pytest.raises(GhostifyError, match=r"training\.json: is (truncated or not JSON|not a file of a training run)"):
        check_run_folder(tmp_path / "t")
    assert (tmp_path / "t" / "training.json").read_text() == damage


def test_a_folder_that_cannot_be_written_is_refused_and_a_check_leaves_nothing(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(GhostifyError, match="cannot be written"):
        check_run_folder(tmp_path / "file" / "t")
    check_run_folder(tmp_path / "t")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(sys.platform != "linux", reason="names of other bytes than UTF-8")
def test_a_name_that_is_not_unicode_is_refused(tmp_path):
    with pytest.raises(GhostifyError, match="is not UTF-8 text"):
        check_run_folder(tmp_path / os.fsdecode(b"\xff"))
    assert not [*tmp_path.iterdir()]


def test_only_the_main_process_writes(tmp_path):
    other = RunFolder(tmp_path / "none", SETTINGS, is_main=False)
    other.log_metrics(1, {"loss": 1.0})
    other.save_best({})
    assert not (tmp_path / "none").exists()


def test_folders_of_other_runs_are_refused(tmp_path):
    RunFolder(tmp_path / "t", SETTINGS, is_main=True).close()
    with pytest.raises(GhostifyError, match="belongs to a run with different images"):
        RunFolder(tmp_path / "t", {**SETTINGS, "images": 6}, is_main=True)
    assert json.loads((tmp_path / "t" / "training.json").read_text()) == SETTINGS
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.png").touch()
    with pytest.raises(GhostifyError, match="holds files that are not of a training run"):
        RunFolder(tmp_path / "mine", SETTINGS, is_main=True)


@pytest.mark.parametrize("name", ["best.safetensors", METRICS, "tensorboard"])
def test_a_link_is_refused_as_a_run_would_write_through_it(tmp_path, name):
    RunFolder(tmp_path / "run", SETTINGS, is_main=True).close()
    (tmp_path / "run" / name).symlink_to(tmp_path / "other")
    with pytest.raises(GhostifyError, match=f"{name}: is a link, and a run writes into its folder alone"):
        check_run_folder(tmp_path / "run")
