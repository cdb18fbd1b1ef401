"""How fast an agent recovers when the hidden rule changes unannounced.

RUNs are trained with --preset switching. Every lifetime's rule is drawn anew once, in the middle, and at no other
time. Compared with the agent: the planner that always knows the rule, Thompson sampling on an exact filter that knows
the switching rate of the training, and on one that expects no switch, whose likelihoods are floored at FLOOR (without
a floor it would stay certain of the old rule). Figure: switching.png in the first run's folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tyro.conf import Positional

from agent import AgentController, System
from context_engine import ActionValues, KnownRuleAgent, ThompsonAgent, rollout
from environment import make_worlds
from main import EVALUATION_SEEDS
from memory import UserError
from tests.benchmarks import command_line, load_systems, run_folders
from world_model import bootstrap_ci, format_ci, mean

LIFETIMES, WINDOW, FLOOR = 2048, 8, 1e-3


def rewards(systems: list[System]) -> dict[str, list[np.ndarray]]:
    """Rewards (LIFETIMES, T) by agent; one array for each run of the trained agent."""
    settings = systems[0].settings
    if not settings.world.switch:
        raise UserError("the rules of this run never switch: train one with python3 main.py --preset switching.")
    world = dataclasses.replace(settings.world, switch_step=settings.world.lifetime // 2)
    seed, q = EVALUATION_SEEDS["test"], ActionValues(world)

    def rewards_of(make: Callable) -> np.ndarray:
        worlds = make_worlds(world, LIFETIMES, "test", seed)
        return rollout(worlds, make(worlds)).reward.numpy()

    return {
        "agent": [rewards_of(lambda _, system=system: AgentController(system)) for system in systems],
        "known rule": [rewards_of(lambda worlds: KnownRuleAgent(worlds, q))],
        "Thompson, knows the rate": [rewards_of(lambda worlds: ThompsonAgent(worlds, q, seed))],
        "Thompson, expects no switch": [
            rewards_of(lambda worlds: ThompsonAgent(worlds, q, seed, switch=0, floor=FLOOR))
        ],
    }


def recovery_time(reward: np.ndarray, share: float = 0.9) -> float:
    """Steps from the switch to the first WINDOW steps whose mean reward is at least `share` of that before it.

    Args:
        reward: (B, T), with the switch in the middle; its last 16 steps before the switch are the standard.

    Returns:
        the step at which that window begins, infinity if there is none.
    """
    middle = reward.shape[1] // 2
    by_step = reward.mean(0)
    before = by_step[middle - 16 : middle].mean()
    after = np.convolve(by_step[middle:], np.ones(WINDOW) / WINDOW, "valid")
    reached = np.flatnonzero(after >= share * before)
    return float(reached[0]) if len(reached) else float("inf")


def plot(found: dict[str, list[np.ndarray]], path: Path) -> None:
    """Reward by step of the lifetime for every agent, in means of WINDOW steps, to `path` (PNG)."""
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, each in found.items():
        by_window = np.concatenate(each).mean(0).reshape(-1, WINDOW).mean(1)
        axes.plot((np.arange(len(by_window)) + 0.5) * WINDOW, by_window, marker=".", label=name)
    axes.axvline(each[0].shape[1] // 2, color="k", linestyle=":")
    axes.set(xlabel="step of the lifetime", ylabel=f"reward per step, mean of {WINDOW} steps")
    axes.set_title("the rule changes in the middle of the lifetime")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main(runs: Positional[tuple[Path, ...]]) -> None:
    """Print the table and save the figure.

    Args:
        runs: Folders of trained runs of --preset switching.
    """
    runs = run_folders(runs)
    systems = load_systems(runs)
    found = rewards(systems)
    middle = systems[0].settings.world.lifetime // 2
    spans = [(-16, 0), (0, 8), (8, 16), (16, 32), (middle - 16, middle)]
    heads = ["16 steps before the switch", "steps 0 to 7 after it", "8 to 15", "16 to 31", "last 16", "steps to 90%"]
    print("| agent | return | " + " | ".join(heads) + " |\n" + "|" + "---|" * 8)
    for name, each in found.items():
        returns, joined = [reward.sum(1)[None] for reward in each], np.concatenate(each)
        total = format_ci(float(np.mean(returns)), bootstrap_ci(mean, *returns), 2)
        means = [f"{joined[:, middle + low : middle + high].mean():.3f}" for low, high in spans]
        recovery = ", ".join(f"{recovery_time(reward):.0f}" for reward in each)
        print("| " + " | ".join([name, total, *means, recovery]) + " |")
    plot(found, runs[0] / "switching.png")
    print(f"\n{LIFETIMES} lifetimes on the test split, {len(runs)} runs; figure in {runs[0] / 'switching.png'}")


if __name__ == "__main__":
    command_line(main)
