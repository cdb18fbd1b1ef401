"""What each part is worth at decision time, weights as trained: `python3 -m tests.benchmarks.ablations RUN [RUN ...]`.

Every run lives the same held-out lifetimes whole and without each part; differences are paired by lifetime.
"""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np

from environment import interval, mean, shown, statistics
from main import Ablation, evaluate, load_system
from tests.benchmarks import named_runs

LIFETIMES = 512


def main(runs: list[Path]) -> None:
    """Print the table."""
    systems = [load_system(run)[0] for run in runs]
    whole = [evaluate(system, "test", LIFETIMES) for system in systems]
    print("| without | return | normalised | difference |\n|---|---|---|---|")
    for part in (None, *get_args(Ablation)):
        results = whole if part is None else [evaluate(system, "test", LIFETIMES, part) for system in systems]
        said = statistics(*results)
        lost = [np.array([one["returns"]["agent"]]) - np.array([all_["returns"]["agent"]]) for one, all_ in zip(results, whole)]
        difference = shown(float(np.mean(lost)), interval(mean, *lost), 2) if part else ""
        figures = (shown(said[name], said[f"{name}_ci95"], digits) for name, digits in (("return_mean", 2), ("normalised", 3)))
        print("| " + " | ".join([part or "nothing", *figures, difference]) + " |", flush=True)
    print(f"\n{LIFETIMES} lifetimes on the test split, {len(runs)} runs")


if __name__ == "__main__":
    main(named_runs("ablations"))
