"""Whether a training that is killed again and again ends in the same bytes as an undisturbed one.

A small training that writes a checkpoint at every update is killed (SIGKILL) at random moments, every other time
while it writes a checkpoint, and resumed each time. In the end its metrics and its evaluation must be, byte for byte,
those of a training that was never interrupted. Exit code 1 if they are not.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from memory import UserError, require
from tests.benchmarks import command_line
from tests.shared import ROOT, TINY

UPDATES_PER_KILL = 40  # length of the training


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    """Start main.py in `folder`; its output goes to log.txt there.

    Two trainings run at the same time, so each has one thread: more would wait for each other's cores.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    line = [sys.executable, str(ROOT / "main.py"), *arguments]
    with open(folder / "log.txt", "ab") as log:  # the process keeps its own handle
        return subprocess.Popen(line, cwd=folder, stdout=log, stderr=log, env=environment)


def run_in(folder: Path) -> Path | None:
    """The only run in a working directory; None if there is none yet."""
    return next(iter(folder.glob("runs/*")), None)


def logged_updates(run: Path) -> int:
    """Number of updates that a run has logged."""
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def kill(process: subprocess.Popen, run: Path, rng: random.Random, while_saving: bool) -> bool:
    """Kill a training after a random number of updates and a random delay; False if it had ended before.

    Args:
        while_saving: wait for the temporary file of a checkpoint before the kill.
    """
    until = logged_updates(run) + rng.randint(1, UPDATES_PER_KILL // 2)
    while process.poll() is None and logged_updates(run) < until:
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.05))
    while process.poll() is None and while_saving and not list(run.glob("*.tmp")):
        pass
    process.kill()
    return process.wait() != 0


def require_success(process: subprocess.Popen, folder: Path) -> None:
    """Wait for a training; UserError with its output if it failed."""
    if process.wait():
        raise UserError(f"a training failed:\n{(folder / 'log.txt').read_text()}")


def main(kills: int = 50, seed: int = 0) -> int:
    """Kill, resume and compare; the exit code.

    Args:
        kills: How often to kill the training, at least 1.
        seed: Decides the moments of the kills.
    """
    require("kills", kills, 1, 10**6)
    rng, updates = random.Random(seed), 40 + UPDATES_PER_KILL * kills
    training = TINY["training"] | {"updates": updates, "log_every": 1, "checkpoint_every": 1}
    with tempfile.TemporaryDirectory() as name:
        undisturbed, killed = Path(name) / "undisturbed", Path(name) / "killed"
        for folder in (undisturbed, killed):
            folder.mkdir()
            (folder / "small.json").write_text(json.dumps(TINY | {"training": training}))
        other, process = (start(folder, "--config", "small.json") for folder in (undisturbed, killed))
        while not (run := run_in(killed)) or not (run / "checkpoint.pt").exists():
            if process.poll() is not None:
                require_success(process, killed)
            time.sleep(0.01)
        done = 0
        for number in range(kills):
            done += kill(process, run, rng, while_saving=number % 2 == 1)
            process = start(killed, "resume", str(run.relative_to(killed)))
        require_success(process, killed)
        require_success(other, undisturbed)
        files = ("metrics.jsonl", "evaluation.json")
        same = all((run / file).read_bytes() == (run_in(undisturbed) / file).read_bytes() for file in files)
    print(f"{done} of {kills} kills interrupted a training of {updates} updates; same bytes in the end: {same}")
    return int(not same)


if __name__ == "__main__":
    command_line(main)
