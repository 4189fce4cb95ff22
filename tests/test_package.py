"""The wheel by itself, in an empty environment: minutes, so only by `make test-slow`."""

import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def succeeds(*command, **options):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=1500, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_installs_alone_and_runs_the_demo(tmp_path):
    succeeds(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    programs = tmp_path / "venv/bin"
    succeeds(programs / "pip", "install", "-q", f"{wheel}[demo]")
    assert "top-1 %" in succeeds(programs / "ghostify", "demo", cwd=tmp_path)
    assert "not installed: pip install 'ghostify[export]'" in " ".join(
        succeeds(programs / "ghostify", "doctor", cwd=tmp_path).split()
    )
    typed = "import ghostify, pathlib; assert (pathlib.Path(ghostify.__file__).parent / 'py.typed').exists()"
    succeeds(programs / "python", "-c", typed, cwd=tmp_path)
    plain = "import torch, ghostify as g; g.write_report(g.ghostify(torch.nn.Conv2d(3, 4, 3)), 'r.html')"
    refused = subprocess.run([programs / "python", "-c", plain], cwd=tmp_path, capture_output=True, text=True)
    assert "pip install 'ghostify[report]'" in refused.stderr
