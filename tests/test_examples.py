"""The scripts that users copy run as they stand, in processes of their own."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from ghostify import ghostify, load, load_weights, save
from ghostify.evaluation.metrics import predict
from ghostify.training.losses import distillation_loss
from tests.command import SCRIPT, run_code, run_pair
from tests.nets import settle

EXAMPLES = Path(__file__).parent.parent / "docs/examples"
NAME, SIZE, COUNT = "test_resnet", 160, 32


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A converted model, its original's weights and some photographs, all as files."""
    torch.manual_seed(0)
    folder, model = tmp_path_factory.mktemp("made"), settle(timm.create_model(NAME))
    save_file(model.state_dict(), folder / "original.safetensors")
    (folder / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 6, 6, 3), dtype=np.uint8)
    for k, own in enumerate(pixels):
        Image.fromarray(own).resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(folder / f"photos/{k}.png")
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).div(128).sub(1)
    images = torch.nn.functional.interpolate(images, (SIZE, SIZE), mode="bicubic")
    save(ghostify(model, 2, example_inputs=images[:1]), folder / "converted")
    return folder, model, images


@pytest.fixture
def setting(made, tmp_path):
    """The same in a folder of the test's own."""
    folder, model, images = made
    return shutil.copytree(folder, tmp_path, dirs_exist_ok=True), model, images


@pytest.mark.parametrize(
    ("script", "processes"), [("plain_loop.py", 1), ("accelerate_loop.py", 1), ("accelerate_loop.py", 2)]
)
def test_a_loop_brings_the_answers_nearer(script, processes, setting):
    folder, model, images = setting
    files = [folder / n for n in ("original.safetensors", "photos", "tuned")]
    command = (SCRIPT, EXAMPLES / script, folder / "converted", NAME, *files)
    results = [run_code(*command, cwd=folder)] if processes == 1 else run_pair(*command, cwd=folder)
    assert [done.returncode for done in results] == [0] * processes, results
    wanted = predict(model, [images])
    apart = [distillation_loss(predict(load(folder / n), [images]), wanted, 2.0) for n in ("converted", "tuned")]
    assert apart[1] < 0.9 * apart[0]


def test_timm_trains_a_converted_model_by_its_name(setting):
    folder, model, images = setting
    script = folder / "train.py"
    script.write_text(
        "import sys, timm, torch\n"
        "assert sys.argv[1:] == ['--model', 'ghostified', '--lr', '0.1'], sys.argv\n"
        "model = timm.create_model('ghostified', pretrained=False, in_chans=3, num_classes=None, drop_rate=0.0)\n"
        "assert any(type(m).__name__ == 'GhostModule' for m in model.modules())\n"
        "torch.nn.init.zeros_(list(model.parameters())[-1])\n"
        f"torch.save({{'epoch': 1, 'state_dict': model.state_dict()}}, {str(folder / 'best.pth.tar')!r})\n"
    )
    command = (EXAMPLES / "timm_train.py", folder / "converted", script, "--model", "ghostified", "--lr", "0.1")
    done = run_code(SCRIPT, *command, cwd=folder)
    assert done.returncode == 0, done.stderr
    tuned = load_weights(load(folder / "converted"), folder / "best.pth.tar")
    assert not torch.equal(predict(tuned, [images]), predict(load(folder / "converted"), [images]))
    save(tuned, folder / "tuned")
    assert torch.equal(predict(load(folder / "tuned"), [images]), predict(tuned, [images]))
    assert predict(model, [images]).shape == predict(tuned, [images]).shape
