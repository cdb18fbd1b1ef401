"""What several tests need: tiny settings, and one trained `quick` run."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from main import Settings
from memory import merge

ROOT = Path(__file__).resolve().parent.parent
TINY = {
    "world": {"grid": 4, "lifetime": 12, "episode_limit": 5},
    "transition": {"outcomes": 8, "free_updates": 4, "tempered_updates": 2, "split_every": 2},
    "context": {"hidden": 8},
    "training": {
        "updates": 24, "worlds": 8, "random_lifetimes": 16, "perception_updates": 6, "outcome_updates": 8, "batch": 8,
        "value_batch": 4, "outcome_batch": 4, "picture_batch": 16, "value_from": 2, "plan_from": 4, "collect_every": 4,
        "evaluation_lifetimes": 16, "log_every": 3, "checkpoint_every": 3,
    },
}  # fmt: skip


def tiny(**changes: dict) -> Settings:
    """Settings that run in a moment; changes are nested mappings as for `memory.merge`."""
    return merge(merge(Settings(), TINY), changes)


def seeded(seed: int = 0) -> torch.Generator:
    """A generator on the CPU."""
    return torch.Generator().manual_seed(seed)


def command(*arguments: str, folder: Path, script: str = "main.py", **options) -> subprocess.CompletedProcess:
    """Run one of the project's scripts as a user would, with `folder` as the working directory."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, **options)


def temporary_folder() -> Path:
    """A folder that is removed when the process ends."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def quick_run() -> Path:
    """The folder of one `--preset quick` run, trained once for all tests of this process."""
    folder = temporary_folder()
    done = command("--preset", "quick", folder=folder)
    assert done.returncode == 0, done.stderr
    (run,) = (folder / "runs").iterdir()
    return run
