"""How soon a training passes Thompson sampling on held-out tasks, and how long it takes in all.

Every seed is a whole training in a process of its own with a validation each few updates, whose seconds are left out.
It has passed where the validation return is above Thompson's on the same lifetimes and stays there. With --before, the
same trainings of another commit, as they come, are run in turns with ours: seconds compare only so.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from agent import Learner
from main import PRESETS, Settings, build_system, evaluate, train, validate, with_preset
from memory import RunFolder, UserError, merge, require
from tests.benchmarks import ROOT, command_line, run_command


def speedrun(preset: str, seed: int, every: int) -> dict[str, float]:
    """Train; when it passed (None if it did not), seconds and frames in all, and what it earns on test tasks."""
    changes = {"seed": seed, "training": {"validate_every": 0, "validation_lifetimes": 256}}
    learner = Learner(build_system(merge(with_preset(Settings(), preset), changes)))
    nodes = learner.settings.planner.nodes  # as when it acts
    begin, seconds, rows = learner.total - learner.training.updates, 0.0, []
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder))  # metrics and checkpoints are written as in any training
        for until in (begin, *range(begin + every, learner.total, every), learner.total):
            start = time.perf_counter()
            if train(learner, run, until=until):
                raise KeyboardInterrupt
            seconds += time.perf_counter() - start
            if until > begin:
                above = float(validate(learner, nodes=nodes)["validation/of_thompson"]) > 1
                rows.append((above, seconds, learner.env_steps))
    passed = next((i for i in range(len(rows)) if all(above for above, *_ in rows[i:])), None)
    when = dict(zip(("pass_seconds", "pass_frames"), (None, None) if passed is None else rows[passed][1:], strict=True))
    result = evaluate(learner.system, "test", learner.training.evaluation_lifetimes)
    scores = {name: result[name] for name in ("return_mean", "normalised", "of_thompson")}
    return when | {"seconds": seconds, "frames": learner.env_steps} | scores


def train_before(checkout: Path, preset: str, seed: int) -> dict[str, float]:
    """Seconds of a training by another version, and what it earns."""
    before = set(checkout.glob("runs/*"))
    run_command([sys.executable, "main.py", "--preset", preset, "--seed", str(seed)], checkout)
    (run,) = set(checkout.glob("runs/*")) - before
    timing, result = (json.loads((run / f"{name}.json").read_text()) for name in ("timing", "evaluation"))
    return {"seconds": timing["total"]} | {key: result[key] for key in ("return_mean", "normalised", "of_thompson")}


def main(
    preset: str = "default",
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    every: int = 50,
    before: str = "",
    one: bool = False,
) -> None:
    """Print a row for each seed, and medians.

    Args:
        preset: What to train.
        seeds: One training each.
        every: Updates between validations.
        before: A commit to compare with; it is checked out into a temporary folder.
        one: Print the first seed's figures as JSON; for the program itself.
    """
    if preset not in PRESETS or preset == "gym":
        raise UserError(f"preset is {preset!r}, but must be one of {', '.join(set(PRESETS) - {'gym'})}.")
    require("every", every, 1, 10**6)
    require("the number of seeds", len(seeds), 1, 1000)
    if one:
        print(json.dumps(speedrun(preset, seeds[0], every)))
        return
    columns = (
        "seed",
        "version",
        f"passes Thompson after, checked every {every} updates",
        "whole training",
        "return",
        "normalised",
        "of Thompson",
        "ratio of seconds",
    )
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    own, old = [], []
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "before"
        if before:
            run_command(["git", "worktree", "add", "--detach", str(checkout), before], ROOT)
        try:
            for seed in seeds:
                command = [sys.executable, "-m", "tests.benchmarks.speedrun", "--one", "--preset", preset]
                printed = run_command([*command, "--seeds", str(seed), "--every", str(every)], ROOT)
                own.append(json.loads(printed.splitlines()[-1]))
                print_row(str(seed), "this", own[-1])
                if before:
                    old.append(train_before(checkout, preset, seed))
                    print_row(str(seed), before, old[-1], own[-1]["seconds"] / old[-1]["seconds"])
        finally:
            if before:
                run_command(["git", "worktree", "remove", "--force", str(checkout)], ROOT)
    ratios = [one["seconds"] / other["seconds"] for one, other in zip(own, old, strict=False)]
    for label, of in (("median", np.median), ("worst", np.max)):
        together = {key: float(of([one[key] or np.inf for one in own])) for key in ("pass_seconds", "pass_frames")}
        together |= {key: float(of([one[key] for one in own])) for key in ("seconds", "frames")}
        least = np.min if label == "worst" else of
        together |= {
            key: float(least([one[key] for one in own])) for key in ("return_mean", "normalised", "of_thompson")
        }
        print_row(label, "this", together, float(of(ratios)) if ratios else None)


def print_row(seed: str, version: str, row: dict, ratio: float | None = None) -> None:
    """Print one training; with the ratio of the seconds of ours to the other version's."""
    passed = f"{row['pass_seconds']:.0f} s, {row['pass_frames']:,.0f} frames" if row.get("pass_seconds") else "-"
    took = f"{row['seconds']:.0f} s" + (f", {row['frames']:,.0f} frames" if "frames" in row else "")
    scores = f"{row['return_mean']:.2f} | {row['normalised']:.3f} | {row['of_thompson']:.3f}"
    print(
        f"| {seed} | {version} | {passed} | {took} | {scores} | {'' if ratio is None else f'{ratio:.2f}'} |", flush=True
    )


if __name__ == "__main__":
    command_line(main)
