"""Benchmarks: they print figures and assert nothing; the product never imports them."""

import sys
from pathlib import Path


def named_runs(benchmark: str, several: bool = True) -> list[Path]:
    """The run folders on a benchmark's command line; exits with its usage where there are none, or more than it takes."""
    runs = [Path(argument) for argument in sys.argv[1:]]
    if not runs or (len(runs) > 1 and not several):
        sys.exit(f"usage: python3 -m tests.benchmarks.{benchmark} RUN" + (" [RUN ...]" if several else ""))
    return runs
