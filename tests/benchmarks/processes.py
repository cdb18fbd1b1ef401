"""How much faster several training processes are than one, and whether they learn as well.

Every seed is trained by one process and by several, of one thread each, in turns; nothing else should run beside. The
runs stay in runs/processes-PRESET-SEED-NUMBER, so that a second call goes on where the first one was stopped.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np

from memory import require
from tests.benchmarks import ROOT, command_line, read_result, run_command, score_cells
from world_model import statistics


def train(preset: str, seed: int, processes: int) -> Path:
    """The folder of a finished training."""
    name = f"processes-{preset}-{seed}-{processes}"
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    options = ["--preset", preset, "--seed", str(seed), "--run", name]
    run_command([sys.executable, *start, "main.py", *options], ROOT, os.environ | {"OMP_NUM_THREADS": "1"})
    return ROOT / "runs" / name


def main(preset: str = "default", seeds: tuple[int, ...] = (0, 1, 2), processes: int = 2) -> None:
    """Print a row for one process and one for several, and the ratio of their seconds.

    Args:
        preset: What to train.
        seeds: A training each, by one process and by several.
        processes: How many the several are.
    """
    require("processes", processes, 2, 1024)
    require("the number of seeds", len(seeds), 1, 1000)
    groups: dict[int, list[Path]] = {1: [], processes: []}
    for seed in seeds:
        for number, runs in groups.items():
            runs.append(train(preset, seed, number))
    print("| processes | seconds, each seed | return, held out | normalised | each seed |\n|---|---|---|---|---|")
    seconds = {}
    for number, runs in groups.items():
        results = [read_result(run, "evaluation.json") for run in runs]
        seconds[number] = np.array([read_result(run, "timing.json")["total"] for run in runs])
        each = (", ".join(f"{x:.0f}" for x in seconds[number]), ", ".join(f"{x['return_mean']:.2f}" for x in results))
        print(f"| {number} | {each[0]} | {' | '.join(score_cells(statistics(*results)))} | {each[1]} |")
    ratio = seconds[processes] / seconds[1]
    print(f"| share of the seconds of one, median | {np.median(ratio):.2f} | | | |")


if __name__ == "__main__":
    command_line(main)
