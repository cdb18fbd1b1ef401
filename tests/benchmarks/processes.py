"""How much faster several training processes are than one, and whether they learn as well.

The runs are complete trainings of one preset, one for each seed, by one process and by several of one thread each:

    OMP_NUM_THREADS=1 python3 main.py --seed 0
    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 main.py --seed 0 --run NAME

Prints held-out returns and the seconds of the training; plots the return of collected lifetimes over environment steps
and over seconds.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from memory import UserError
from tests.benchmarks import command_line, read_result, score_cells, training_curve
from world_model import statistics


def plot(groups: dict[str, tuple[Path, ...]], path: Path) -> None:
    """Return of collected lifetimes over environment steps and over seconds, one line for each run, to `path` (PNG)."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    by_steps, by_seconds = figure.subplots(1, 2, sharey=True)
    for colour, (name, runs) in zip(("C0", "C1"), groups.items(), strict=True):
        for number, run in enumerate(runs):
            seconds, env_steps, returns = training_curve(run).T
            label = None if number else name
            by_steps.plot(env_steps, returns, colour, alpha=0.6, label=label)
            by_seconds.plot(seconds, returns, colour, alpha=0.6, label=label)
    by_steps.set(xlabel="environment steps", ylabel="return of collected lifetimes")
    by_seconds.set(xlabel="seconds")
    by_steps.legend(title="processes")
    figure.savefig(path, dpi=110)


def main(one: tuple[Path, ...], several: tuple[Path, ...], output: Path = Path("processes.png")) -> None:
    """Print the table and save the figure.

    Args:
        one: Folders of finished runs by one process.
        several: Folders of finished runs by several processes.
        output: File of the figure (PNG); overwritten.
    """
    if not one or not several:
        raise UserError("give at least one run each to --one and --several.")
    groups = {"one": one, "several": several}
    print("| processes | seconds, mean | return, held out | normalised | each run |\n|---|---|---|---|---|")
    seconds = {}
    for name, runs in groups.items():
        results = [read_result(run, "evaluation.json") for run in runs]
        seconds[name] = float(np.mean([read_result(run, "timing.json")["total"] for run in runs]))
        each = ", ".join(f"{result['return_mean']:.2f}" for result in results)
        print(f"| {name} | {seconds[name]:.0f} | {' | '.join(score_cells(statistics(*results)))} | {each} |")
    plot(groups, output)
    print(f"\nspeed-up {seconds['one'] / seconds['several']:.2f}; figure in {output}")


if __name__ == "__main__":
    command_line(main)
