"""How soon a training passes Thompson sampling on held-out tasks, and how long it takes in all.

Every seed is a whole training in a process of its own with a validation each few updates, whose seconds are left out.
It has passed where the validation return is above Thompson's on the same lifetimes and stays there. With --before, the
same trainings of another commit, as they come, are run in turns with ours: seconds compare only so.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from agent import Learner
from main import PRESETS, Settings, build_system, evaluate, train, validate, with_preset
from memory import UserError, merge
from tests.benchmarks import command_line

ROOT = Path(__file__).resolve().parent.parent.parent


def speedrun(preset: str, seed: int, every: int) -> dict[str, float]:
    """Train; when it passed (None if it did not), seconds and frames in all, and what it earns on test tasks."""
    changes = {"seed": seed, "training": {"validate_every": 0, "validation_lifetimes": 256}}
    learner = Learner(build_system(merge(with_preset(Settings(), preset), changes)))
    begin, seconds, rows = learner.total - learner.training.updates, 0.0, []
    for until in (begin, *range(begin + every, learner.total, every), learner.total):
        start = time.perf_counter()
        train(learner, until=until)
        seconds += time.perf_counter() - start
        if until > begin:
            above = float(validate(learner)["validation/of_thompson"]) > 1
            rows.append((above, seconds, learner.env_steps))
    passed = next((i for i in range(len(rows)) if all(above for above, *_ in rows[i:])), None)
    when = dict(zip(("pass_seconds", "pass_frames"), (None, None) if passed is None else rows[passed][1:], strict=True))
    result = evaluate(learner.system, "test", learner.training.evaluation_lifetimes)
    scores = {name: result[name] for name in ("return_mean", "normalised", "of_thompson")}
    return when | {"seconds": seconds, "frames": learner.env_steps} | scores


def train_before(checkout: Path, preset: str, seed: int) -> dict[str, float]:
    """Seconds of a training by another version, and what it earns."""
    name = f"speedrun-{seed}"
    command = [sys.executable, "main.py", "--preset", preset, "--seed", str(seed), "--run", name]
    subprocess.run(command, cwd=checkout, check=True, capture_output=True)
    timing, result = (
        json.loads((checkout / "runs" / name / f"{x}.json").read_text()) for x in ("timing", "evaluation")
    )
    return {"seconds": timing["total"]} | {key: result[key] for key in ("return_mean", "normalised", "of_thompson")}


def main(
    preset: str = "default",
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    every: int = 20,
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
    if one:
        print(json.dumps(speedrun(preset, seeds[0], every)))
        return
    columns = ("seed", "version", "passes Thompson after", "all", "return", "normalised", "of Thompson")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    rows: dict[str, list[dict]] = {"this": [], **({before: []} if before else {})}
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "before"
        if before:
            subprocess.run(
                ["git", "worktree", "add", "--detach", checkout, before], cwd=ROOT, check=True, capture_output=True
            )
        try:
            for seed in seeds:
                command = [sys.executable, "-m", "tests.benchmarks.speedrun", "--one", "--preset", preset]
                command += ["--seeds", str(seed), "--every", str(every)]
                own = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
                print_row(seed, "this", json.loads(own.stdout), rows)
                if before:
                    print_row(seed, before, train_before(checkout, preset, seed), rows)
        finally:
            if before:
                subprocess.run(["git", "worktree", "remove", "--force", checkout], cwd=ROOT, check=True)
    passes = [row["pass_seconds"] or np.inf for row in rows["this"]]
    print(f"\npasses Thompson after {np.median(passes):.0f} s (median), {max(passes):.0f} s (worst)")
    for version, done in rows.items():
        seconds, returns = (np.median([row[key] for row in done]) for key in ("seconds", "return_mean"))
        print(f"{version}: {seconds:.0f} s in all (median), return {returns:.2f}")
    if before:
        ratios = [own["seconds"] / old["seconds"] for own, old in zip(*rows.values(), strict=True)]
        print(
            f"seconds, ratio by seed: {', '.join(f'{ratio:.2f}' for ratio in ratios)}; median {np.median(ratios):.2f}"
        )


def print_row(seed: int, version: str, row: dict, rows: dict[str, list[dict]]) -> None:
    """Print one training and keep it."""
    rows[version].append(row)
    passed = f"{row['pass_seconds']:.0f} s, {row['pass_frames']:,} frames" if row.get("pass_seconds") else "-"
    took = f"{row['seconds']:.0f} s" + (f", {row['frames']:,} frames" if "frames" in row else "")
    scores = f"{row['return_mean']:.2f} | {row['normalised']:.3f} | {row['of_thompson']:.3f}"
    print(f"| {seed} | {version} | {passed} | {took} | {scores} |", flush=True)


if __name__ == "__main__":
    command_line(main)
