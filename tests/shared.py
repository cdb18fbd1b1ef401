"""What several tests need: tiny settings, commands and their folders, and one trained `quick` run."""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock
from collections.abc import Callable, Sequence

import gymnasium
import numpy as np
import torch

import main
from main import Settings
from memory import merge

ROOT = Path(__file__).resolve().parent.parent
TINY = {
    "world": {"grid": 4, "lifetime": 12, "episode_limit": 5},
    "transition": {"num_effects": 8, "warmup_updates": 4, "annealed_updates": 2, "split_every": 2},
    "context": {"hidden": 8},
    "training": {
        "updates": 24, "envs": 8, "random_lifetimes": 16, "perception_updates": 6, "effect_updates": 8, "batch": 8,
        "value_batch": 4, "effect_batch": 4, "frame_batch": 16, "value_from": 2, "plan_from": 4, "collect_every": 4,
        "evaluation_lifetimes": 16, "log_every": 3, "checkpoint_every": 3,
    },
}  # fmt: skip


class Room(gymnasium.Env):
    """Somebody else's world: 3x3 cells of 4 pixels, five actions (four moves and none), .5 in the corner, ten steps.

    Args:
        reward: in the corner.
    """

    MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1), (0, 0))
    observation_space = gymnasium.spaces.Box(0, 255, (12, 12, 3), np.uint8)
    action_space = gymnasium.spaces.Discrete(5)

    def __init__(self, reward: float = 0.5) -> None:
        self.reward = reward

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.episode_step = self.np_random.integers(0, 3, 2) * [1, 0], 0
        return self._sample(), {}

    def step(self, action):
        self.place, self.episode_step = np.clip(self.place + self.MOVES[action], 0, 2), self.episode_step + 1
        there = bool((self.place == 2).all())
        return self._sample(), self.reward if there else 0.0, there, self.episode_step >= 10, {}

    def _sample(self):
        picture = np.zeros((3, 4, 3, 4, 3), np.uint8)
        picture[2, :, 2, :, 1], picture[self.place[0], :, self.place[1], :, 0] = 250, 250
        return picture.reshape(12, 12, 3)


gymnasium.register("Room-v0", entry_point=Room)


def tiny(**changes: dict) -> Settings:
    """Settings that run in a moment; changes are nested mappings as for `memory.merge`."""
    return merge(merge(Settings(), TINY), changes)


def make_generator(seed: int = 0) -> torch.Generator:
    """A generator on the CPU."""
    return torch.Generator().manual_seed(seed)


def command(*arguments: str, folder: Path, script: str = "main.py", threads: int = 1) -> subprocess.CompletedProcess:
    """Run one of the project's scripts as a user would, with `folder` as the working directory."""
    process = start(*arguments, folder=folder, script=script, threads=threads)
    output, errors = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def start(
    *arguments: str, folder: Path, script: str = "main.py", launcher: Sequence[str] = (), threads: int = 1
) -> subprocess.Popen:  # fmt: skip
    """Begin what `command` runs to its end, by a launcher such as -m torch.distributed.run, which is torchrun. Tiny settings gain
    nothing by a second thread, and lose much where it must wait for its core."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    line = [sys.executable, *launcher, str(ROOT / script), *map(str, arguments)]
    return subprocess.Popen(line, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def children_of(process: subprocess.Popen) -> list[int]:
    """Process numbers of what a process has started, on POSIX systems."""
    return [int(pid) for pid in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()]


def wait_for(happened: Callable[[], object], seconds: float = 120) -> None:
    """Return once something has happened; TimeoutError if it does not."""
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.005)


def only_run(folder: Path) -> Path:
    """The folder of the only run in a working directory."""
    (run,) = (folder / "runs").iterdir()
    return run


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def tiny_folder(**training: int) -> Path:
    """A folder with tiny settings in tiny.json."""
    folder = temporary_folder()
    (folder / "tiny.json").write_text(json.dumps(TINY | {"training": TINY["training"] | training}))
    return folder


def in_process(arguments: list[str], folder: Path) -> tuple[int, str]:
    """Exit code and error output of the command line, without the seconds that a new process takes to import."""
    errors, quiet, before = io.StringIO(), contextlib.redirect_stdout(io.StringIO()), Path.cwd()
    os.chdir(folder)
    try:
        with mock.patch.object(sys, "argv", ["main.py", *arguments]), contextlib.redirect_stderr(errors), quiet:
            main.main()
        return 0, errors.getvalue()
    except SystemExit as stop:
        return stop.code, errors.getvalue()
    finally:
        os.chdir(before)


def temporary_folder() -> Path:
    """A folder that is removed when the process ends."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def quick_run() -> Path:
    """The folder of one `--preset quick` run, trained once for all tests of this process."""
    folder = temporary_folder()
    done = command("--preset", "quick", folder=folder, threads=os.cpu_count() or 1)
    assert done.returncode == 0, done.stderr
    (run,) = (folder / "runs").iterdir()
    return run
