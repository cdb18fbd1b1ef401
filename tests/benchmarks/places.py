"""What remembering what happened where contributes: trainings without it beside the given runs.

For each of RUNs, in a world whose rewards or ends depend on places, an agent with the same settings and seed is trained
whose reward and termination heads see neither what came with a code at its place nor what the episode has earned; the
planner still knows the grid that episodes begin with. Both are evaluated in the same held-out lifetimes. Differences
are between trainings: their interval is Student's t over seeds.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tyro.conf import Positional

from agent import Learner, System
from main import Settings, build_system, evaluate, train
from tests.benchmarks import command_line, load_systems, over_seeds, score_cells
from world_model import statistics


def train_without(settings: Settings) -> System:
    """Train an agent whose heads read nothing of the memory of places."""
    system = build_system(settings)
    with torch.no_grad():
        system.transition.place_past.weight.zero_().requires_grad_(False)
    learner = Learner(system)
    train(learner)
    return learner.system


def main(runs: Positional[tuple[Path, ...]], lifetimes: int = 256) -> None:
    """Print the table.

    Args:
        runs: Folders of trained runs.
        lifetimes: Held-out lifetimes of each evaluation, at least 2.
    """
    found: dict[str, list[dict]] = {"nothing": [], "the memory of places": []}
    for system in load_systems(runs):
        print(f"training without the memory of places, seed {system.settings.seed}", file=sys.stderr)
        for results, one in zip(found.values(), (system, train_without(system.settings)), strict=True):
            results.append(evaluate(one, "test", lifetimes))
    print("| removed | return | normalised | difference | each run |\n|---|---|---|---|---|")
    whole = [result["return_mean"] for result in found["nothing"]]
    for name, results in found.items():
        returns = [result["return_mean"] for result in results]
        changes = [one - full for one, full in zip(returns, whole, strict=True)]
        difference = "" if results is found["nothing"] else over_seeds(changes, 2)
        each = ", ".join(f"{one:.2f}" for one in returns)
        print(f"| {name} | {' | '.join(score_cells(statistics(*results)))} | {difference} | {each} |")
    print(f"\n{lifetimes} lifetimes on the test split for each of {len(whole)} runs")


if __name__ == "__main__":
    command_line(main)
