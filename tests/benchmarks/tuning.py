"""Whether tuning pays: `python3 -m tests.benchmarks.tuning --tuned RUN [RUN ...] --baseline RUN [RUN ...]`.

The runs are whole trainings, one for each seed, with the best set of a study and with the set that the study began from.
Their final evaluations are compared on the test split, which the study never read. All live the same lifetimes, so the
difference is paired by lifetime. The study behind the README's figures lies in `tests/benchmarks/study/`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from main import bootstrap_ci, mean, format_ci, statistics
from tests.benchmarks import scores


@dataclass(frozen=True)
class Arguments:
    """Compare runs of two sets of settings on held-out tasks."""

    tuned: tuple[Path, ...]
    """Finished runs with the best set."""
    baseline: tuple[Path, ...]
    """Finished runs with the set that the search began from; as many."""


def main(arguments: Arguments) -> None:
    """Print the table."""
    sets = {"baseline": arguments.baseline, "tuned": arguments.tuned}
    print("| settings | return | normalised | difference | each run |\n|---|---|---|---|---|")
    earned = {}
    for name, runs in sets.items():
        results = [json.loads((run / "evaluation.json").read_text()) for run in runs]
        earned[name] = np.array([result["returns"]["agent"] for result in results], float)
        difference = ""
        if name == "tuned":
            paired = (earned["tuned"] - earned["baseline"])[:, None]  # (runs, 1, lifetimes)
            difference = format_ci(float(paired.mean()), bootstrap_ci(mean, *paired), 2)
        each = ", ".join(f"{returns.mean():.2f}" for returns in earned[name])
        print(f"| {name} | {' | '.join(scores(statistics(*results)))} | {difference} | {each} |")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
