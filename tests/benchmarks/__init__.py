"""Benchmarks: they print figures and assert nothing; the product never imports them."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from main import format_ci


def named_runs(benchmark: str, several: bool = True) -> list[Path]:
    """The run folders on a benchmark's command line; exits with its usage where there are none, or more than it takes."""
    runs = [Path(argument) for argument in sys.argv[1:]]
    if not runs or (len(runs) > 1 and not several):
        sys.exit(f"usage: python3 -m tests.benchmarks.{benchmark} RUN" + (" [RUN ...]" if several else ""))
    return runs


def scores(said: dict[str, Any]) -> list[str]:
    """Return and normalised return of an evaluation, or of several joined, with their intervals: two cells of a table."""
    return [format_ci(said[key], said[f"{key}_ci95"], digits) for key, digits in (("return_mean", 2), ("normalised", 3))]


def collected(run: Path) -> np.ndarray:
    """Seconds since the first line of metrics, frames, and return of the latest collection: (lines, 3)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # takes a second

    events = EventAccumulator(str(run / "tensorboard"), {"scalars": 0})
    events.Reload()
    seen = events.Scalars("charts/return")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    frames = {line["update"]: line["env_steps"] for line in lines}
    return np.array([(event.wall_time - seen[0].wall_time, frames[event.step], event.value) for event in seen])
