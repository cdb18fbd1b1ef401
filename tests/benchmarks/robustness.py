"""How trained weights bear noise and slips they were not trained on: `python3 -m tests.benchmarks.robustness RUN [RUN ...]`.

The same weights live in worlds of noise 0, .1, .2, .3 times slip 0, .15, .3, on held-out tasks; each cell is the agent's
return, its share of Thompson sampling's in the same world, and the known rule's. References have a perfect eye and know the
slip, so what noise costs falls on the agent alone. Markdown to the screen, a figure to robustness.png beside the first run.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from main import evaluate, load_system, format_ci, statistics
from tests.benchmarks import named_runs

NOISES, SLIPS, LIFETIMES = (0.0, 0.1, 0.2, 0.3), (0.0, 0.15, 0.3), 512


def cell(systems: list, noise: float, slip: float) -> tuple[dict, dict]:
    """Statistics of all runs in a world of that noise and slip, and the first run's evaluation (for its references)."""
    results = []
    for system in systems:
        world = dataclasses.replace(system.trained.world, noise=noise, slip=slip)
        system.settings = dataclasses.replace(system.trained, world=world)
        results.append(evaluate(system, "test", LIFETIMES))
    return statistics(*results), results[0]


def main(runs: list[Path]) -> None:
    """Print the table and draw the figure."""
    systems = [load_system(run)[0] for run in runs]
    for system in systems:
        system.trained = system.settings
    cells = {(noise, slip): cell(systems, noise, slip) for slip in SLIPS for noise in NOISES}
    print("| slip | noise | agent | of Thompson | Thompson | known rule |\n|---|---|---|---|---|---|")
    for (noise, slip), (joined, first) in cells.items():
        figures = (format_ci(joined[name], joined[f"{name}_ci95"], 2) for name in ("return_mean", "of_thompson"))
        bars = (f"{first[name]['return_mean']:.2f}" for name in ("thompson", "known_rule"))
        print("| " + " | ".join([f"{slip:g}", f"{noise:g}", *figures, *bars]) + " |")
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    for axes, slip in zip(figure.subplots(1, len(SLIPS), sharey=True, squeeze=False)[0], SLIPS):
        means = np.array([cells[noise, slip][0]["return_mean"] for noise in NOISES])
        ends = np.array([cells[noise, slip][0]["return_mean_ci95"] for noise in NOISES])
        axes.errorbar(NOISES, means, np.abs(ends.T - means), marker="o", label="agent")
        for name, label in (("thompson", "Thompson sampling"), ("known_rule", "known rule")):
            axes.plot(NOISES, [cells[noise, slip][1][name]["return_mean"] for noise in NOISES], "--", label=label)
        axes.set(title=f"slip {slip:g}", xlabel="noise")
    figure.axes[0].set_ylabel("return per lifetime")
    figure.axes[0].legend(fontsize="small")
    figure.savefig(runs[0] / "robustness.png", dpi=120)
    print(f"\n{LIFETIMES} lifetimes a cell and run, {len(runs)} runs; figure in {runs[0] / 'robustness.png'}")


if __name__ == "__main__":
    main(named_runs("robustness"))
