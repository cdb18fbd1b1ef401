"""What several test files need: tiny settings, the command line in this process or a new one, and runs trained once."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import gymnasium
import numpy as np
import torch

import main
from agent import Learner, System
from main import Settings, build_system
from memory import PlaceMemory, Processes, merge

torch.set_num_threads(1)  # tiny settings gain nothing from a second thread, and results depend on their number
ROOT = Path(__file__).resolve().parent.parent
slow = unittest.skipUnless(os.environ.get("SLOW_TESTS"), "slow: set SLOW_TESTS=1")


def installed(module: str) -> Callable:
    """Skips a test where a module of tests/requirements.txt is missing."""
    return unittest.skipUnless(importlib.util.find_spec(module), "needs pip install -r tests/requirements.txt")


TINY = {
    "world": {"grid": 4, "lifetime": 12, "episode_limit": 5},
    "context": {"hidden": 8},
    "training": {
        "updates": 24,
        "envs": 8,
        "random_lifetimes": 16,
        "perception_updates": 6,
        "effect_updates": 8,
        "batch": 8,
        "value_batch": 4,
        "effect_batch": 4,
        "frame_batch": 16,
        "value_from": 2,
        "plan_from": 4,
        "collect_every": 4,
        "evaluation_lifetimes": 16,
        "log_every": 3,
        "validate_every": 0,
        "checkpoint_every": 3,
    },
}
TOTAL = 38  # updates of all phases


class Room(gymnasium.Env):
    """An external environment: 3x3 cells of 4 pixels, four moves and one action without effect, at most ten steps.

    Args:
        reward: for reaching the corner, which ends the episode.
    """

    MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1), (0, 0))
    observation_space = gymnasium.spaces.Box(0, 255, (12, 12, 3), np.uint8)
    action_space = gymnasium.spaces.Discrete(5)

    def __init__(self, reward: float = 0.5) -> None:
        self.reward = reward

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.episode_step = self.np_random.integers(0, 3, 2) * [1, 0], 0
        return self._render(), {}

    def step(self, action):
        self.place, self.episode_step = np.clip(self.place + self.MOVES[action], 0, 2), self.episode_step + 1
        reached = bool((self.place == 2).all())
        return self._render(), self.reward if reached else 0.0, reached, self.episode_step >= 10, {}

    def _render(self):
        frame = np.zeros((3, 4, 3, 4, 3), np.uint8)
        frame[2, :, 2, :, 1], frame[self.place[0], :, self.place[1], :, 0] = 250, 250
        return frame.reshape(12, 12, 3)


gymnasium.register("Room-v0", entry_point=Room)
gymnasium.register("OtherRoom-v0", entry_point=Room)


def tiny(**changes: dict) -> Settings:
    """Settings that train in a second; changes are nested mappings as for `memory.merge`."""
    return merge(merge(Settings(), TINY), changes)


def tiny_system(num_effects: int = 8, **changes: dict) -> System:
    """An untrained system with `tiny` settings, as if so many effects had been found."""
    system = build_system(tiny(**changes))
    system.set_num_effects(num_effects)
    return system


def make_generator(seed: int = 0) -> torch.Generator:
    """A generator on the CPU."""
    return torch.Generator().manual_seed(seed)


def places_of(batch: int, patches: int, codes: int) -> PlaceMemory:
    """Random memories of places."""
    places = PlaceMemory.empty(batch, patches, codes)
    places.sums.copy_(torch.rand(places.sums.shape, generator=make_generator()))
    return places


# ------------------------------------------------------------------------------------------------------ folders


def temporary_folder() -> Path:
    """A folder that is removed when the process ends."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def tiny_folder(**training: int) -> Path:
    """A folder with tiny settings in tiny.json."""
    folder = temporary_folder()
    (folder / "tiny.json").write_text(json.dumps(TINY | {"training": TINY["training"] | training}))
    return folder


def only_run(folder: Path) -> Path:
    """The folder of the only run in a working directory."""
    (run,) = (folder / "runs").iterdir()
    return run


def copy_of(run: Path) -> Path:
    """A copy of a run, as the only run of a working directory of its own."""
    return shutil.copytree(run, temporary_folder() / "runs" / run.name)


# ------------------------------------------------------------------------------------------------- command line


def in_process(arguments: Sequence[object], folder: Path) -> tuple[int, str]:
    """Exit code and printed text of main.py, without the seconds that a new process takes to import.

    The standard error comes first, then the standard output.
    """
    errors, output, before = io.StringIO(), io.StringIO(), Path.cwd()
    os.chdir(folder)
    try:
        with (
            contextlib.redirect_stderr(errors),
            contextlib.redirect_stdout(output),
        ):
            main.run_program("main.py", main.command_line, list(map(str, arguments)))
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        os.chdir(before)
    return code, errors.getvalue() + output.getvalue()


def command(*arguments: object, folder: Path, script: str = "main.py", threads: int = 1) -> subprocess.CompletedProcess:
    """Run one of the project's scripts as a user would, with `folder` as the working directory."""
    process = start(*arguments, folder=folder, script=script, threads=threads)
    output, errors = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def start(
    *arguments: object, folder: Path, script: str = "main.py", launcher: Sequence[str] = (), threads: int = 1
) -> subprocess.Popen:
    """Start what `command` waits for; the launcher may be -m torch.distributed.run, which is torchrun.

    Tiny settings gain nothing from a second thread and lose much where it must wait for a core.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    line = [sys.executable, *launcher, str(ROOT / script), *map(str, arguments)]
    return subprocess.Popen(
        line, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def children_of(process: subprocess.Popen) -> list[int]:
    """Ids of the processes that a process has started, on POSIX systems."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def wait_for(happened: Callable[[], object], seconds: float = 120) -> None:
    """Return once something has happened; TimeoutError if it does not."""
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.005)


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# ---------------------------------------------------------------------------------------------- several processes


def in_parallel(work: Callable[[Processes], Any], count: int = 2) -> list[Any]:
    """Results of `work(processes)` for every rank, where threads of this process stand for the processes of torchrun.

    Only the collectives of torch.distributed are replaced: each thread hands its tensor over and gets those of all.
    """
    rank, values = threading.local(), [None] * count
    barrier = threading.Barrier(count, timeout=120)

    def exchange(value: Any) -> list:
        values[rank.number] = value
        barrier.wait()
        found = list(values)
        barrier.wait()
        return found

    def all_reduce(tensor):
        tensor.copy_(torch.stack(exchange(tensor.clone())).sum(0))

    def all_gather(parts, tensor):
        for part, value in zip(parts, exchange(tensor.clone()), strict=True):
            part.copy_(value)

    def broadcast(tensor, src):
        tensor.copy_(exchange(tensor.clone())[src])

    def all_gather_object(found, content):
        found[:] = exchange(content)

    results, errors = [None] * count, []

    def run(number: int) -> None:
        rank.number = number
        try:
            results[number] = work(Processes(number, count))
        except threading.BrokenBarrierError:
            pass  # another thread has failed
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    collectives = [all_reduce, all_gather, broadcast, all_gather_object]
    with (
        mock.patch.multiple(torch.distributed, **{each.__name__: each for each in collectives}),
        mock.patch("signal.signal"),  # only the main thread may set handlers
    ):
        threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    return results


def stopped_at(
    update: int, what: BaseException | None = None, interrupts: int = 0, number: int = signal.SIGINT
) -> mock._patch:
    """A patch under which a training gets so many signals, Ctrl-C by default, or raises `what`, at an update."""
    set_learning_rates = Learner.set_learning_rates

    def stopping(learner: Learner, *arguments: object) -> None:
        if learner.update == update:
            for _ in range(interrupts):
                signal.raise_signal(number)
            if what is not None:
                raise what
        set_learning_rates(learner, *arguments)

    return mock.patch.object(Learner, "set_learning_rates", stopping)


# -------------------------------------------------------------------------------------------------- trained runs


def complete_run(*arguments: str, folder: Path) -> Path:
    """Run the command line in this process; the folder of the run that it makes."""
    code, printed = in_process(list(arguments), folder)
    assert code == 0, printed
    return only_run(folder)


@functools.cache
def tiny_run() -> Path:
    """The folder of a complete run with tiny settings; tests that write into it use `copy_of`."""
    return complete_run("--config", "tiny.json", folder=tiny_folder())


@functools.cache
def quick_run() -> Path:
    """The folder of a run of `--preset quick`, trained once for all tests of this process."""
    return complete_run("--preset", "quick", folder=temporary_folder())
