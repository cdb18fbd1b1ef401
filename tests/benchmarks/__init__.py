"""Benchmarks: they print figures and assert nothing; the product never imports them."""

import sys
from pathlib import Path
from typing import Any

from agent import shown


def named_runs(benchmark: str, several: bool = True) -> list[Path]:
    """The run folders on a benchmark's command line; exits with its usage where there are none, or more than it takes."""
    runs = [Path(argument) for argument in sys.argv[1:]]
    if not runs or (len(runs) > 1 and not several):
        sys.exit(f"usage: python3 -m tests.benchmarks.{benchmark} RUN" + (" [RUN ...]" if several else ""))
    return runs


def scores(said: dict[str, Any]) -> list[str]:
    """Return and normalised return of an evaluation, or of several joined, with their intervals: two cells of a table."""
    return [shown(said[key], said[f"{key}_ci95"], digits) for key, digits in (("return_mean", 2), ("normalised", 3))]
