"""How fast an agent recovers when the rule changes unannounced: `python3 -m tests.benchmarks.switching RUN [RUN ...]`.

RUNs are trained with --preset switching. Every lifetime's rule is drawn anew once, in the middle, and at no other time.
Beside the agent: the planner that always knows the rule, Thompson sampling on an exact filter that knows the switching rate
of training, and on one that expects no switch, whose likelihoods are floored at FLOOR (without a floor it would be
certain of the old rule for ever). Figure to switching.png beside the first run.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from agent import rollout
from context_engine import ActionValues, KnownRuleAgent, ThompsonAgent
from environment import make_worlds
from main import EVALUATION_SEEDS, bootstrap_ci, load_system, mean, format_ci
from tests.benchmarks import named_runs

LIFETIMES, WINDOW, FLOOR = 2048, 8, 1e-3


def rewards(systems: list) -> dict[str, list[np.ndarray]]:
    """Rewards (LIFETIMES, T) by agent; those of the trained agents are one for each run."""
    settings = systems[0].settings
    if not settings.world.switch:
        sys.exit("the rules of this run's world never switch: train one with python3 main.py --preset switching")
    world = dataclasses.replace(settings.world, switch_step=settings.world.lifetime // 2)
    seed = EVALUATION_SEEDS["test"]
    q = ActionValues(world)

    def live(make) -> np.ndarray:
        there = make_worlds(world, LIFETIMES, "test", seed)
        return rollout(there, make(there)).reward.numpy()

    return {
        "agent": [live(lambda _, system=system: system.controller()) for system in systems],
        "known rule": [live(lambda there: KnownRuleAgent(there, q))],
        "Thompson, knows the rate": [live(lambda there: ThompsonAgent(there, q, seed))],
        "Thompson, expects no switch": [live(lambda there: ThompsonAgent(there, q, seed, switch=0, floor=FLOOR))],
    }


def recovery(reward: np.ndarray, share: float = 0.9) -> float:
    """Steps after the switch until the mean reward of the WINDOW steps from then on is `share` of that of the 16 before."""
    middle = reward.shape[1] // 2
    by_step = reward.mean(0)
    before = by_step[middle - 16 : middle].mean()
    after = np.convolve(by_step[middle:], np.ones(WINDOW) / WINDOW, "valid")
    reached = np.flatnonzero(after >= share * before)
    return float(reached[0]) if len(reached) else float("inf")


def main(runs: list[Path]) -> None:
    """Print the table and draw the figure."""
    systems = [load_system(run)[0] for run in runs]
    found = rewards(systems)
    middle = systems[0].settings.world.lifetime // 2
    print("| agent | return | 16 steps before the switch | steps 0 to 7 after it | 8 to 15 | 16 to 31 | last 16 | steps to 90% |")
    print("|" + "---|" * 8)
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, each in found.items():
        returns = [reward.sum(1)[None] for reward in each]
        joined = np.concatenate(each)
        spans = [(-16, 0), (0, 8), (8, 16), (16, 32), (middle - 16, middle)]
        figures = [f"{joined[:, middle + low : middle + high].mean():.3f}" for low, high in spans]
        print("| " + " | ".join([name, format_ci(float(np.mean(returns)), bootstrap_ci(mean, *returns), 2), *figures,
                                 ", ".join(f"{recovery(reward):.0f}" for reward in each)]) + " |")  # fmt: skip
        axes.plot(np.arange(0, 2 * middle, WINDOW) + WINDOW / 2, joined.mean(0).reshape(-1, WINDOW).mean(1), marker=".", label=name)
    axes.axvline(middle, color="k", linestyle=":")
    axes.set(xlabel="step of the lifetime", ylabel=f"reward a step, {WINDOW}-step means", title="the rule changes in mid-life")
    axes.legend(fontsize="small")
    figure.savefig(runs[0] / "switching.png", dpi=120)
    print(f"\n{LIFETIMES} lifetimes on the test split, {len(runs)} runs; figure in {runs[0] / 'switching.png'}")


if __name__ == "__main__":
    main(named_runs("switching"))
