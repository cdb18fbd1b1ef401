"""The learnt belief beside exact Bayes: `python3 -m tests.benchmarks.belief RUN`.

1. nll a step: how unexpected each step was to the agent and to the exact filter, on the same held-out lifetimes.
2. calibration: where the agent gave an effect the probability p, how often did it happen?
3. a linear probe: how much of the exact posterior over rules can be read from the context vector by least squares, fitted
   on training tasks and scored (R^2, over all the posterior's components) on held-out ones, by step of the lifetime. The
   context holds a row for each action, so the move of each action can be linear in it; which of the 24 permutations it is
   cannot: functions that are linear in a permutation matrix explain at most 9/23 of the 24 indicators' variance.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from agent import System
from context_engine import ExactFilter
from environment import DIRECTIONS, HiddenRulesWorld, WorldSettings, rule_space_of
from main import EVALUATION_SEED, load_system
from transition_model import merge_equal
from tests.benchmarks import named_runs

LIFETIMES = 2048
STEPS = ((0, 1), (1, 4), (4, 8), (8, 16), (16, 32), (32, 64))


class Recorder:
    """An agent that lives and keeps, for each step: context, exact posterior, predicted effects and what happened."""

    def __init__(self, system: System, split: str, seed: int) -> None:
        world = HiddenRulesWorld(system.settings.world, LIFETIMES, split, seed)
        agent, exact = system.controller(), ExactFilter(world)
        frames = world.reset()
        agent.reset(frames)
        exact.reset(frames)
        kept: list[tuple[Tensor, ...]] = []
        for _ in range(system.settings.world.lifetime):
            with torch.no_grad():
                context = system.engine.context(agent.belief)
                prior = system.transition.log_prior(context[:, :-1]).exp()
            posterior = exact.log_posterior.exp()
            action = agent.act()
            step = world.step(action)
            for listener in (agent, exact):
                listener.observe(action, step)
            happened = agent.memory.latest().posterior[:, 0].float()
            _, first = system.transition.effects.predict(agent.codes)
            chosen = prior[torch.arange(LIFETIMES), action]
            kept.append((context.flatten(1), posterior, *(merge_equal(mass[:, None], first)[:, 0] for mass in (chosen, happened))))
        self.context, self.posterior, self.predicted, self.happened = (torch.stack(x) for x in zip(*kept))
        self.nll = [torch.stack(one.nll).double().mean(1).numpy() for one in (agent, exact)]


def marginals(posterior: Tensor) -> dict[str, Tensor]:
    """What a rule consists of, under posteriors (..., rules): which move each action makes, which map, which roles."""
    space = rule_space_of(WorldSettings())
    joint = posterior.unflatten(-1, (len(space.action_maps), len(space.colours)))
    maps = joint.sum(-1)
    makes = torch.nn.functional.one_hot(space.action_maps, DIRECTIONS).float().flatten(1)  # (24, action * move)
    return {"4 moves": maps @ makes, "24 action maps": maps, "6 role assignments": joint.sum(-2)}


def probe(fit: Recorder, score: Recorder) -> dict[str, list[float]]:
    """R^2 on `score`'s lifetimes of least squares fitted on `fit`'s, by part of the rule and by range of steps."""
    found: dict[str, list[float]] = {}
    with_one = lambda x: torch.cat([x, torch.ones(len(x), 1)], 1).double()  # noqa: E731
    for name in marginals(fit.posterior[:1]):
        for low, high in STEPS[1:]:
            parts = [(with_one(one.context[low:high].flatten(0, 1)), marginals(one.posterior[low:high])[name].flatten(0, 1).double())
                     for one in (fit, score)]  # fmt: skip
            weights = torch.linalg.lstsq(*parts[0], driver="gelsd").solution
            inputs, target = parts[1]
            error, spread = (target - inputs @ weights).square().sum(), (target - target.mean(0)).square().sum()
            found.setdefault(name, []).append(float(1 - error / spread))
    return found


def calibration(one: Recorder, low: int, high: int, bins: int = 10) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean predicted probability and mean frequency by bin, and the expected calibration error, of all effects."""
    predicted, happened = (x[low:high].flatten().double().numpy() for x in (one.predicted, one.happened))
    format_ci = predicted > 1e-3  # effects that nobody expects and that do not happen say nothing
    predicted, happened = predicted[format_ci], happened[format_ci]
    which = np.minimum((predicted * bins).astype(int), bins - 1)
    count = np.bincount(which, minlength=bins)
    means = [np.bincount(which, x, minlength=bins) / np.maximum(count, 1) for x in (predicted, happened)]
    return *means, float((count / count.sum() * np.abs(means[0] - means[1])).sum())


def main(run: Path) -> None:
    """Print three tables, draw them to belief.png in the run's folder."""
    system, _ = load_system(run)
    held_out, training = Recorder(system, "test", EVALUATION_SEED + 1), Recorder(system, "train", EVALUATION_SEED + 50)
    found = probe(training, held_out)
    print("| steps | agent, nll a step | exact filter | calibration error |" + "".join(f" R^2 of {name} |" for name in found))
    print("|" + "---|" * (4 + len(found)))
    for number, (low, high) in enumerate(STEPS):
        nll = [f"{one[low:high].mean():.3f}" for one in held_out.nll]
        scores = ["-" if number == 0 else f"{values[number - 1]:.3f}" for values in found.values()]
        print("| " + " | ".join([f"{low} to {high - 1}", *nll, f"{calibration(held_out, low, high)[2]:.3f}", *scores]) + " |")
    figure = Figure(figsize=(10, 3), layout="constrained")
    nll, calibrated, probed = figure.subplots(1, 3)
    for values, label in zip(held_out.nll, ("agent", "exact filter")):
        nll.plot(values, label=label)
    nll.set(title="nll", xlabel="step of the lifetime", ylabel="nll")
    calibrated.plot([0, 1], [0, 1], "k:", linewidth=1)
    for low, high in STEPS[1:]:
        predicted, happened, _ = calibration(held_out, low, high)
        calibrated.plot(predicted, happened, marker=".", label=f"steps {low} to {high - 1}")
    calibrated.set(title="calibration", xlabel="predicted", ylabel="happened")
    for name, values in found.items():
        probed.plot([low for low, _ in STEPS[1:]], values, marker=".", label=name)
    probed.set(title="R^2 of a linear probe", xlabel="from step", ylabel="of the exact posterior", xscale="log", ylim=(0, 1))
    for axes in (nll, calibrated, probed):
        axes.legend(fontsize="x-small")
    figure.savefig(run / "belief.png", dpi=120)
    print(f"\n{LIFETIMES} lifetimes of each split; figure in {run / 'belief.png'}")


if __name__ == "__main__":
    main(*named_runs("belief", several=False))
