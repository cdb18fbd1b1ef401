"""How much faster several training processes are than one, and whether they learn as well.

Every seed is trained by one process of one thread, by one of several threads and by several of one thread each, in
turns; nothing else should run beside. The runs stay in runs/, so that a second call goes on where the first one was
stopped.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np

from memory import require
from tests.benchmarks import ROOT, command_line, read_result, run_command, score_cells
from world_model import statistics


def train(name: str, preset: str, seed: int, processes: int, threads: int) -> Path:
    """The folder of a finished training."""
    name = f"{name}-{preset}-{seed}-{processes}-{threads}"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "--"]
    start = torchrun if processes > 1 else []
    options = ["--preset", preset, "--seed", str(seed), "--run", name]
    run_command([sys.executable, *start, "main.py", *options], ROOT, os.environ | {"OMP_NUM_THREADS": str(threads)})
    return ROOT / "runs" / name


def main(
    preset: str = "default", seeds: tuple[int, ...] = (0, 1, 2), processes: int = 2, name: str = "processes"
) -> None:
    """Print a row for each way to train.

    Args:
        preset: What to train.
        seeds: Seeds, each trained in every way.
        processes: How many processes, or threads, the several are.
        name: Beginning of the names of the runs.
    """
    require("processes", processes, 2, 1024)
    require("the number of seeds", len(seeds), 1, 1000)
    groups: dict[tuple[int, int], list[Path]] = {(1, 1): [], (1, processes): [], (processes, 1): []}
    for seed in seeds:
        for way, runs in groups.items():
            runs.append(train(name, preset, seed, *way))
    heads = ("processes", "threads of each", "seconds, each seed", "of the first", "return", "normalised", "each seed")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    first = None
    for way, runs in groups.items():
        results = [read_result(run, "evaluation.json") for run in runs]
        seconds = np.array([read_result(run, "timing.json")["total"] for run in runs])
        first = seconds if first is None else first
        each = ", ".join(f"{x:.0f}" for x in seconds), ", ".join(f"{x['return_mean']:.2f}" for x in results)
        scores = " | ".join(score_cells(statistics(*results)))
        print(f"| {way[0]} | {way[1]} | {each[0]} | {np.median(seconds / first):.2f} | {scores} | {each[1]} |")


if __name__ == "__main__":
    command_line(main)
