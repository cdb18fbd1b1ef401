"""How trained weights cope with noise and slips that they were not trained on.

Every agent is evaluated on held-out tasks for every pair of a noise and a slip probability. A row of the table holds
its return, its share of Thompson sampling's return in the same environments, and the references' returns. References
read the true state and know the slip probability, so noise costs the agent alone. Figure: robustness.png in the first
run's folder.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tyro.conf import Positional

from agent import System
from main import evaluate
from tests.benchmarks import command_line, load_systems, run_folders
from world_model import format_ci, statistics

NOISES, SLIPS, LIFETIMES = (0.0, 0.1, 0.2, 0.3), (0.0, 0.15, 0.3), 512


def evaluate_shifted(systems: list[System], noise: float, slip: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Statistics of all runs under that noise and slip, and the first run's evaluation, for its references."""
    results = []
    for system in systems:
        world = dataclasses.replace(system.settings.world, noise=noise, slip=slip)
        shifted = dataclasses.replace(system, settings=dataclasses.replace(system.settings, world=world))
        results.append(evaluate(shifted, "test", LIFETIMES))
    return statistics(*results), results[0]


def plot(cells: dict[tuple[float, float], tuple[dict, dict]], path: Path) -> None:
    """Return over noise, one panel for each slip, to `path` (PNG).

    Args:
        cells: results of `evaluate_shifted` by (noise, slip).
    """
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    for axes, slip in zip(figure.subplots(1, len(SLIPS), sharey=True, squeeze=False)[0], SLIPS, strict=True):
        joined, first = zip(*(cells[noise, slip] for noise in NOISES), strict=True)
        means = np.array([stats["return_mean"] for stats in joined])
        ends = np.array([stats["return_mean_ci95"] for stats in joined])
        axes.errorbar(NOISES, means, np.abs(ends.T - means), marker="o", label="agent")
        for name, label in (("thompson", "Thompson sampling"), ("known_rule", "known rule")):
            axes.plot(NOISES, [result[name]["return_mean"] for result in first], "--", label=label)
        axes.set(title=f"slip {slip:g}", xlabel="noise")
    figure.axes[0].set_ylabel("return per lifetime")
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main(runs: Positional[tuple[Path, ...]]) -> None:
    """Print the table and save the figure.

    Args:
        runs: Folders of trained runs of one preset.
    """
    runs = run_folders(runs)
    systems = load_systems(runs)
    cells = {(noise, slip): evaluate_shifted(systems, noise, slip) for slip in SLIPS for noise in NOISES}
    print("| slip | noise | agent | of Thompson | Thompson | known rule |\n|---|---|---|---|---|---|")
    for (noise, slip), (joined, first) in cells.items():
        agent = [format_ci(joined[name], joined[f"{name}_ci95"], 2) for name in ("return_mean", "of_thompson")]
        references = [f"{first[name]['return_mean']:.2f}" for name in ("thompson", "known_rule")]
        print("| " + " | ".join([f"{slip:g}", f"{noise:g}", *agent, *references]) + " |")
    plot(cells, runs[0] / "robustness.png")
    print(f"\n{LIFETIMES} lifetimes for each row and run, {len(runs)} runs; figure in {runs[0] / 'robustness.png'}")


if __name__ == "__main__":
    command_line(main)
