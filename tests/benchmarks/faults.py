"""Killing a training again and again: `python3 -m tests.benchmarks.faults [--kills 50] [--seed 0]`.

One small training that writes a checkpoint at every update is killed (SIGKILL) at random moments, every other time while it
writes a checkpoint, and resumed each time. In the end its metrics and its evaluation must be, byte for byte, those of a
training that nobody disturbed.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from tests.shared import ROOT, TINY

UPDATES_A_KILL = 40  # that the training is longer for each


@dataclass(frozen=True)
class Arguments:
    """How often to kill."""

    kills: int = 50
    """Times, at least 1."""
    seed: int = 0
    """Of the moments."""


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    """The project's main.py in `folder`, on one thread: there are two of them, and threads that wait for each other's cores are slow."""
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(folder / "log.txt", "ab") as log:  # the process keeps its own handle
        return subprocess.Popen([sys.executable, str(ROOT / "main.py"), *arguments], cwd=folder, stdout=log, stderr=log, env=alone)


def run_of(folder: Path) -> Path | None:
    """The only run in a folder, once there is one."""
    return next(iter(folder.glob("runs/*")), None)


def updates_of(run: Path) -> int:
    """How many updates a run has logged."""
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def kill(process: subprocess.Popen, run: Path, luck: random.Random, while_saving: bool) -> bool:
    """Let it train on for some updates and a moment, then kill it; False if it had ended before."""
    until = updates_of(run) + luck.randint(1, UPDATES_A_KILL // 2)
    while process.poll() is None and updates_of(run) < until:
        time.sleep(0.001)
    time.sleep(luck.uniform(0, 0.05))
    while process.poll() is None and while_saving and not list(run.glob("*.tmp")):
        pass
    process.kill()
    return process.wait() != 0


def main(arguments: Arguments) -> bool:
    """Kill, resume, compare; prints what happened; whether the bytes are the same."""
    luck = random.Random(arguments.seed)
    updates = 40 + UPDATES_A_KILL * arguments.kills
    settings = json.dumps(TINY | {"training": TINY["training"] | {"updates": updates, "log_every": 1, "checkpoint_every": 1}})
    with tempfile.TemporaryDirectory() as name:
        whole, killed = Path(name) / "whole", Path(name) / "killed"
        for folder in (whole, killed):
            folder.mkdir()
            (folder / "small.json").write_text(settings)
        undisturbed, process = start(whole, "--config", "small.json"), start(killed, "--config", "small.json")
        while not (run := run_of(killed)) or not (run / "checkpoint.pt").exists():
            if process.poll() is not None:
                sys.exit((killed / "log.txt").read_text())
            time.sleep(0.01)
        done = 0
        for number in range(arguments.kills):
            done += kill(process, run, luck, while_saving=number % 2 == 1)
            process = start(killed, "resume", str(run.relative_to(killed)))
        if process.wait() or undisturbed.wait():
            sys.exit((killed / "log.txt").read_text() + (whole / "log.txt").read_text())
        files = ("metrics.jsonl", "evaluation.json")
        same = all((run / file).read_bytes() == (run_of(whole) / file).read_bytes() for file in files)
    print(f"{done} kills of {arguments.kills} struck a training of {updates} updates; same bytes in the end: {same}")
    return same


if __name__ == "__main__":
    sys.exit(not main(tyro.cli(Arguments)))
