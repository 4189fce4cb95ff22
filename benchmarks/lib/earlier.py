"""A conversion by an earlier version of this repository, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ghostify import load

ROOT = Path(__file__).parents[2]
COMMIT = "1e5ec67e428e2fe2f1230a1b7882e96b7bfc66d1"
CONVERT = """
import json, sys, torch
from ghostify import ghostify, save
torch.set_num_threads(int(sys.argv[2]))
given = torch.load("given.pt", weights_only=False)
module = ghostify(given["model"], **json.loads(sys.argv[1]), example_inputs=given["batches"][0][:1],
                  calibration=given["batches"], ignore=given["ignore"])
save(module, "converted")
"""


def converted_at(
    commit: str, model: nn.Module, batches: tuple[Tensor, ...], ignore: Any, settings: Mapping[str, Any]
) -> nn.Module:
    """What `ghostify(model, calibration=batches, **settings)` returned at a commit of this repository."""
    with tempfile.TemporaryDirectory() as folder:
        code = subprocess.run(["git", "archive", commit, "ghostify"], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "x", "-C", folder], input=code, check=True)
        torch.save({"model": model, "batches": batches, "ignore": ignore}, Path(folder) / "given.pt")
        path = os.pathsep.join([folder, str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-c", CONVERT, json.dumps(settings), str(torch.get_num_threads())]
        subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, check=True)
        return load(Path(folder) / "converted")
