"""How close the learnt belief is to exact Bayesian inference: prediction, calibration and a linear probe.

1. Negative log-likelihood of each step in nats, of the agent and of the exact filter, in the same held-out lifetimes.
2. Calibration: of the effects that the agent gave the probability p, which share happened?
3. A linear probe: how much of the exact posterior over rules can be read from the context vector by least squares,
fitted on training tasks and scored on held-out ones (R^2 over all components of the posterior) by step of the
lifetime. The context holds a row for each action, so the move of each action can be linear in it. Which of the 24
permutations it is cannot: functions that are linear in a permutation matrix explain at most 9/23 of the variance of
the 24 indicators.

Figure: belief.png in the run's folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from tyro.conf import Positional

from agent import AgentController, System
from context_engine import ExactFilter
from environment import DIRECTIONS, HiddenRulesWorld, WorldSettings, rule_space_of
from main import EVALUATION_SEED, load_system
from memory import UserError
from tests.benchmarks import command_line
from transition_model import merge_equal

LIFETIMES = 2048
STEPS = ((0, 1), (1, 4), (4, 8), (8, 16), (16, 32), (32, 64))  # ranges of steps, each a row of the table


class Record(NamedTuple):
    """What an agent and the exact filter believed before each of T steps of B lifetimes."""

    context: Tensor  # (T, B, (A + 1) * D) float32
    posterior: Tensor  # (T, B, rules) float32, of the exact filter
    predicted: Tensor  # (T, B, K) float32: probability of every effect after the action taken
    happened: Tensor  # (T, B, K) float32: posterior of the effect that happened
    nll: list[np.ndarray]  # of the agent and of the exact filter: (T,) float64, nats, mean over lifetimes


def record(system: System, split: str, seed: int) -> Record:
    """Roll out the agent of `system` and the exact filter together."""
    world = HiddenRulesWorld(system.settings.world, LIFETIMES, split, seed)
    agent, exact = AgentController(system), ExactFilter(world)
    frames = world.reset()
    agent.reset(frames)
    exact.reset(frames)
    steps: list[tuple[Tensor, ...]] = []
    for _ in range(system.settings.world.lifetime):
        posterior = exact.log_posterior.exp()
        action = agent.act()
        with torch.no_grad():
            prior = system.transition.log_prior(agent.context[:, :-1]).exp()
        step = world.step(action)
        agent.observe(action, step)
        exact.observe(action, step)
        happened = agent.memory.latest().posterior[:, 0].float()
        # Effects that lead to the same codes from here count as one.
        _, first, _ = system.transition.effects.predict(agent.codes)
        predicted = merge_equal(prior[torch.arange(LIFETIMES), action][:, None], first)[:, 0]
        happened = merge_equal(happened[:, None], first)[:, 0]
        steps.append((agent.context.flatten(1), posterior, predicted, happened))
    nll = [torch.stack(one.nll).double().mean(1).numpy() for one in (agent, exact)]
    return Record(*(torch.stack(part) for part in zip(*steps, strict=True)), nll)


def marginals(posterior: Tensor) -> dict[str, Tensor]:
    """Parts of posteriors (..., 144) over the default rules: (..., 16), (..., 24) and (..., 6)."""
    space = rule_space_of(WorldSettings())
    joint = posterior.unflatten(-1, (len(space.action_maps), len(space.colours)))
    maps = joint.sum(-1)
    makes = F.one_hot(space.action_maps, DIRECTIONS).float().flatten(1)  # (24, action * move)
    return {"4 moves": maps @ makes, "24 action maps": maps, "6 role assignments": joint.sum(-2)}


def probe(fit: Record, score: Record) -> dict[str, list[float]]:
    """R^2 on `score` of least squares fitted on `fit`, by part of the rule, one for each of STEPS but the first."""
    found: dict[str, list[float]] = {}
    for name in marginals(fit.posterior[:1]):
        for low, high in STEPS[1:]:
            inputs, targets = [], []
            for one in (fit, score):
                context = one.context[low:high].flatten(0, 1)
                inputs.append(F.pad(context, (0, 1), value=1.0).double())  # with an intercept
                targets.append(marginals(one.posterior[low:high])[name].flatten(0, 1).double())
            weights = torch.linalg.lstsq(inputs[0], targets[0], driver="gelsd").solution
            error = (targets[1] - inputs[1] @ weights).square().sum()
            spread = (targets[1] - targets[1].mean(0)).square().sum()
            found.setdefault(name, []).append(float(1 - error / spread))
    return found


def calibration(one: Record, low: int, high: int, bins: int = 10) -> tuple[np.ndarray, np.ndarray, float]:
    """Calibration of the predicted effects in the steps from `low` to `high`.

    Returns:
        mean predicted probability (bins,), observed frequency (bins,), and the expected calibration error.
    """
    predicted, happened = (x[low:high].flatten().double().numpy() for x in (one.predicted, one.happened))
    expected = predicted > 1e-3  # the many effects that nobody expects and that do not happen would hide the rest
    predicted, happened = predicted[expected], happened[expected]
    index = np.minimum((predicted * bins).astype(int), bins - 1)
    count = np.bincount(index, minlength=bins)
    means = [np.bincount(index, x, minlength=bins) / np.maximum(count, 1) for x in (predicted, happened)]
    return *means, float((count / count.sum() * np.abs(means[0] - means[1])).sum())


def plot(held_out: Record, found: dict[str, list[float]], path: Path) -> None:
    """The three comparisons side by side, to `path` (PNG)."""
    figure = Figure(figsize=(10, 3), layout="constrained")
    nll, calibrated, probed = figure.subplots(1, 3)
    for values, label in zip(held_out.nll, ("agent", "exact filter"), strict=True):
        nll.plot(values, label=label)
    nll.set(title="negative log-likelihood", xlabel="step of the lifetime", ylabel="nats")
    calibrated.plot([0, 1], [0, 1], "k:", linewidth=1)
    for low, high in STEPS[1:]:
        predicted, happened, _ = calibration(held_out, low, high)
        calibrated.plot(predicted, happened, marker=".", label=f"steps {low} to {high - 1}")
    calibrated.set(title="calibration", xlabel="predicted probability", ylabel="observed frequency")
    for name, values in found.items():
        probed.plot([low for low, _ in STEPS[1:]], values, marker=".", label=name)
    probed.set(title="linear probe of the posterior", xlabel="from step", ylabel="R^2", xscale="log", ylim=(0, 1))
    for axes in (nll, calibrated, probed):
        axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)


def main(run: Positional[Path]) -> None:
    """Print the table and save the figure.

    Args:
        run: Folder of a trained run with the default rules.
    """
    system, _ = load_system(run)
    world = system.settings.world
    if world.gym_id or len(rule_space_of(world)) != len(rule_space_of(WorldSettings())):
        raise UserError("the linear probe is for runs with the default rules, of 4 actions, 2 objects, and no wind.")
    held_out, training = record(system, "test", EVALUATION_SEED + 1), record(system, "train", EVALUATION_SEED + 50)
    found = probe(training, held_out)
    heads = [
        "steps",
        "agent, nats per step",
        "exact filter",
        "calibration error",
        *(f"R^2 of {name}" for name in found),
    ]
    print("| " + " | ".join(heads) + " |\n" + "|" + "---|" * len(heads))
    for number, (low, high) in enumerate(STEPS):
        nll = [f"{one[low:high].mean():.3f}" for one in held_out.nll]
        error = f"{calibration(held_out, low, high)[2]:.3f}"
        scores = ["-" if number == 0 else f"{values[number - 1]:.3f}" for values in found.values()]
        print("| " + " | ".join([f"{low} to {high - 1}", *nll, error, *scores]) + " |")
    plot(held_out, found, run / "belief.png")
    print(f"\n{LIFETIMES} lifetimes of each split; figure in {run / 'belief.png'}")


if __name__ == "__main__":
    command_line(main)
