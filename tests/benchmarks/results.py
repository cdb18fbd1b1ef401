"""The README's table of results, from finished runs: `python3 -m tests.benchmarks.results RUN [RUN ...]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean


def row(run: Path) -> dict:
    """What the table shows of one run: its evaluation, and the seconds that training took."""
    result = json.loads((run / "evaluation.json").read_text())
    return result | {"seconds": json.loads((run / "timing.json").read_text())["total"]}


def show(value: float, interval: list[float], digits: int) -> str:
    """A figure with its 95% interval."""
    return f"{value:.{digits}f} [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"


def table(rows: list[dict]) -> str:
    """Markdown: a line for each run and one of their means."""
    lines = ["| preset, seed | agent | Thompson | known rule | random | normalised | of Thompson | belief, nats over exact | training |"]
    lines.append("|" + "---|" * 9)
    for r in rows:
        lines.append(
            f"| {r['preset']}, {r['seed']} | {show(r['agent']['return_mean'], r['agent']['return_ci95'], 2)} "
            f"| {r['thompson']['return_mean']:.2f} | {r['known_rule']['return_mean']:.2f} | {r['random']['return_mean']:.2f} "
            f"| {show(r['normalised'], r['normalised_ci95'], 3)} | {show(r['of_thompson'], r['of_thompson_ci95'], 3)} "
            f"| {r['belief_nats']['late_excess']:+.3f} | {r['seconds']:.0f} s |"
        )
    means = [mean(r[key] for r in rows) for key in ("normalised", "of_thompson")]
    returns = mean(r["agent"]["return_mean"] for r in rows)
    lines.append(f"| mean of {len(rows)} | {returns:.2f} | | | | {means[0]:.3f} | {means[1]:.3f} | | |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python3 -m tests.benchmarks.results RUN [RUN ...]")
    print(table([row(Path(argument)) for argument in sys.argv[1:]]))
