"""Whether tuned settings beat those that the search began from, on held-out tasks.

A study (tune_hyperparams.py) starts from the settings of the given runs and sees validation tasks only; its best set is
then trained in full, once with the seed of each run. Final evaluations are on the test split, all in the same
lifetimes. Differences are between trainings: their interval is Student's t over seeds. Study and runs stay in runs/, so
that a second call goes on where the first one was stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tyro.conf import Positional

from memory import UserError
from tests.benchmarks import ROOT, command_line, over_seeds, read_result, run_command, run_folders, score_cells
from world_model import statistics


def search(run: Path, name: str, trials: int) -> Path:
    """The folder of a study of so many trials that starts from the settings of a run."""
    options = ["--config", str(run / "config.json"), "--study", name, "--trials", str(trials)]
    run_command([sys.executable, "tune_hyperparams.py", *options], ROOT)
    return ROOT / "runs" / f"tune-{name}"


def train(study: Path, name: str, seed: int) -> Path:
    """The folder of a finished training with the best set of a study."""
    options = ["--config", str(study / "best.json"), "--seed", str(seed), "--run", f"{name}-{seed}"]
    run_command([sys.executable, "main.py", *options], ROOT)
    return ROOT / "runs" / f"{name}-{seed}"


def main(runs: Positional[tuple[Path, ...]], trials: int = 20, name: str = "tuning") -> None:
    """Search, train with the best set, and print the table.

    Args:
        runs: Folders of finished runs that differ by their seeds only.
        trials: Trials of the study.
        name: Name of the study, and beginning of the names of the runs with its best set.
    """
    runs = run_folders(runs)
    configs = [read_result(run, "config.json") for run in runs]
    seeds = [config.pop("seed") for config in configs]
    if any(config != configs[0] for config in configs) or len(set(seeds)) < len(seeds):
        raise UserError("the runs must have the same settings, and a different seed each: train them anew.")
    results = {"start": [read_result(run, "evaluation.json") for run in runs]}
    study = search(runs[0], name, trials)
    found = read_result(study, "trials.json")
    if found["baseline"] is None:
        raise UserError(f"the first trial, with the settings of the runs, failed: see {study / 'trials.json'}.")
    scores = {trial["number"]: trial["score"] for trial in found["trials"] if trial["state"] == "COMPLETE"}
    best = max(scores, key=scores.get)
    results["best"] = [read_result(train(study, name, seed), "evaluation.json") for seed in seeds]
    print("| settings | score in the study | return | normalised | difference | each run |\n|---|---|---|---|---|---|")
    for row, number in {"start": found["baseline"], "best": best}.items():
        returns = [result["return_mean"] for result in results[row]]
        changes = [one - result["return_mean"] for one, result in zip(returns, results["start"], strict=True)]
        cells = [f"{row}, trial {number}", f"{scores[number]:.3f}", *score_cells(statistics(*results[row]))]
        each = ", ".join(f"{one:.2f}" for one in returns)
        print(f"| {' | '.join(cells)} | {over_seeds(changes, 2) if row == 'best' else ''} | {each} |")
    print(f"\n{trials} trials, of which {len(scores)} were not pruned; {len(runs)} runs of each")


if __name__ == "__main__":
    command_line(main)
