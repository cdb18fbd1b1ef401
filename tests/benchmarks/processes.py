"""What a second process brings: `python3 -m tests.benchmarks.processes --alone RUN [RUN ...] --together RUN [RUN ...]`.

The runs are whole trainings of one preset, one for each seed, by one process and by several of one thread each:

    OMP_NUM_THREADS=1 python3 main.py --seed 0
    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 main.py --seed 0

Draws what they collect over frames and over seconds, and prints the held-out return and the seconds of every part.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from main import statistics
from tests.benchmarks import collected, scores


@dataclass(frozen=True)
class Arguments:
    """Compare runs by one process and by several."""

    alone: tuple[Path, ...]
    """Finished runs of one process."""
    together: tuple[Path, ...]
    """Finished runs of several processes."""
    output: Path = Path("processes.png")
    """The figure; written over."""


def main(arguments: Arguments) -> None:
    """Print the tables, draw the figure."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3), constrained_layout=True, sharey=True)
    seconds = {}
    print("| processes | seconds, mean | return, held out | normalised | each run |\n|---|---|---|---|---|")
    for colour, (name, runs) in zip(("C0", "C1"), (("one", arguments.alone), ("several", arguments.together))):
        results = [json.loads((run / "evaluation.json").read_text()) for run in runs]
        timings = [json.loads((run / "timing.json").read_text()) for run in runs]
        seconds[name] = {part: float(np.mean([timing[part] for timing in timings])) for part in timings[0]}
        each = ", ".join(f"{result['return_mean']:.2f}" for result in results)
        print(f"| {name} | {seconds[name]['total']:.0f} | {' | '.join(scores(statistics(*results)))} | {each} |")
        for number, run in enumerate(runs):
            points = collected(run)
            for axis, column in zip(axes, (1, 0)):
                axis.plot(points[:, column], points[:, 2], colour, alpha=0.6, label=None if number else name)
    print("\n| part | one, seconds | several | times faster |\n|---|---|---|---|")
    for part, spent in sorted(seconds["one"].items(), key=lambda item: -item[1]):
        print(f"| {part} | {spent:.0f} | {seconds['several'][part]:.0f} | {spent / seconds['several'][part]:.2f} |")
    axes[0].set(xlabel="frames", ylabel="return of collected lifetimes")
    axes[1].set(xlabel="seconds")
    axes[0].legend(title="processes")
    figure.savefig(arguments.output, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
