"""Whether tuned settings beat those that the search began from, on held-out tasks.

The runs are complete trainings, one for each seed, with the best settings of a study (tune_hyperparams.py) and with
its first. Their final evaluations are on the test split, which the study never used. All agents are evaluated in the
same lifetimes, so the difference is paired by lifetime.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from memory import UserError
from tests.benchmarks import command_line, read_result, score_cells
from world_model import bootstrap_ci, format_ci, mean, statistics


def main(tuned: tuple[Path, ...], baseline: tuple[Path, ...]) -> None:
    """Print the table.

    Args:
        tuned: Folders of finished runs with the best settings.
        baseline: Folders of finished runs with the settings that the search began from; as many.
    """
    if not tuned or len(tuned) != len(baseline):
        raise UserError(f"{len(tuned)} tuned and {len(baseline)} baseline runs: give as many of both, at least one.")
    print("| settings | return | normalised | difference | each run |\n|---|---|---|---|---|")
    returns = {}
    for name, runs in {"baseline": baseline, "tuned": tuned}.items():
        results = [read_result(run, "evaluation.json") for run in runs]
        returns[name] = np.array([result["returns"]["agent"] for result in results], float)  # (runs, lifetimes)
        difference = ""
        if name == "tuned":
            paired = (returns["tuned"] - returns["baseline"])[:, None]  # (runs, 1, lifetimes)
            difference = format_ci(float(paired.mean()), bootstrap_ci(mean, *paired), 2)
        each = ", ".join(f"{run.mean():.2f}" for run in returns[name])
        print(f"| {name} | {' | '.join(score_cells(statistics(*results)))} | {difference} | {each} |")


if __name__ == "__main__":
    command_line(main)
