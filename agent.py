"""Agents: the controller that infers, plans and acts, reference agents on the exact filter; how lifetimes compare.

Every agent answers `begin(frames)`, `act() -> actions` and `observe(actions, step)`; `play` drives any of them.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import scipy.stats
import torch
from torch import Tensor

from context_engine import AppearanceEngine, ContextInferenceEngine, ExactFilter
from environment import (
    ActionValues, GymWorlds, HiddenRulesWorld, Split, WorldSettings, WorldStep, by_role, seeded, tensor_of,
)  # fmt: skip
from memory import EpisodicMemory, UserError
from transition_model import ModeTable, TransitionModel
from world_model import VAE, Planner

if TYPE_CHECKING:  # whoever only steps the world need not wait for matplotlib
    from matplotlib.axes import Axes


class Agent(Protocol):
    """What `play` asks of an agent of B worlds."""

    def begin(self, frames: Tensor) -> None:
        """A lifetime begins with pictures (B, H, W, 3) uint8: forget the last one."""

    def act(self) -> Tensor:
        """Choose actions (B,) int64 on what was seen last."""

    def observe(self, action: Tensor, step: WorldStep) -> None:
        """Learn what actions (B,) led to."""


class AgentController:
    """Perceives, infers the rules, plans and acts, in B worlds at once.

    Args:
        vae, transition, engine: perception, dynamics and inference.
        planner: answers `action_values(codes, context, depth, modes)`.
        lifetime: steps of a lifetime.
        appearance: infers how everything looks, and its context modulates the VAE; without it the world's row does.
        keep_pictures: keep the pictures in `memory`, for the store of past lifetimes.
        look_again: plan with the second look, where the planner has one.
    """

    def __init__(
        self, vae: VAE, transition: TransitionModel, engine: ContextInferenceEngine, planner: Planner, lifetime: int,
        appearance: AppearanceEngine | None = None, keep_pictures: bool = False, look_again: bool = True,
    ) -> None:  # fmt: skip
        self.vae, self.transition, self.engine, self.planner = vae, transition, engine, planner
        self.lifetime, self.keep_pictures = lifetime, keep_pictures
        self.appearance, self.look_again = appearance, look_again
        self.exploration, self.generator = 0.0, None

    @classmethod
    def load(cls, run: Path | str, device: str | None = None) -> AgentController:
        """The trained agent of a run's folder, for a loop of one's own: `begin`, then `act` and `observe` in turn.

        Raises:
            UserError: not the folder of a run, or its checkpoint is damaged.
        """
        from main import load_system  # the wiring knows its parts, not the other way round

        return load_system(Path(run), device)[0].controller()

    def explore(self, exploration: float, generator: torch.Generator) -> None:
        """From now on act at random with probability `exploration` in [0, 1], drawn from `generator`."""
        self.exploration, self.generator = exploration, generator

    def begin(self, frames: Tensor | np.ndarray) -> None:
        """A lifetime begins: the memory is cleared, because what happened under another rule says nothing here. One
        picture (H, W, 3) is a batch of one."""
        frames = tensor_of(frames) if isinstance(frames, np.ndarray) else frames
        frames = frames.to(next(self.vae.parameters()).device)
        frames = frames[None] if frames.ndim == 3 else frames
        patches = self.vae.grid[0] * self.vae.grid[1]
        self.memory = EpisodicMemory(
            len(frames), self.lifetime, patches, self.transition.settings.outcomes, frames.device, self.keep_pictures
        )
        self.frame, self.belief, self.look = frames, self.engine.initial_belief(len(frames)), None
        self.modes = ModeTable(self.transition.outcome_network)
        self.nats: list[Tensor] = []  # for each step, how unexpected it was (B,), as in ExactFilter

    @torch.no_grad()
    def act(self) -> Tensor:
        """Choose actions (B,) int64: greedy on the planner's values, or random where exploring."""
        self.vision = self._vision()  # the pair around this action is seen under one context
        self.codes = self.vae.encode(self.frame, self.vision)
        if self.exploration >= 1:  # no need to plan
            return self._random()
        depth, context = 2 if self.look_again else 1, self.engine.context(self.belief)
        action = self.planner.action_values(self.codes, context, depth, self.modes).argmax(-1)
        if self.exploration > 0:
            chance = torch.rand(len(action), generator=self.generator, device=action.device)
            action = torch.where(chance < self.exploration, self._random(), action)
        return action

    @torch.no_grad()
    def observe(self, action: Tensor, step: WorldStep) -> None:
        """Name what happened, remember it, and update the belief."""
        action, step = action.to(self.frame.device), WorldStep(*(part.to(self.frame.device) for part in step))
        next_codes = self.vae.encode(step.arrival, self.vision)
        likelihood = self.transition.outcome_network.log_likelihood(self.codes, next_codes)
        posterior = self.transition.effect_posterior(likelihood)
        self.nats.append(self.transition.surprise(likelihood, action, self.engine.context(self.belief)))
        self.memory.append(self.codes, next_codes, posterior, action, self.frame, step)
        self.belief = self.engine.step(self.belief, self.memory.latest())
        self.frame = step.frame

    def _vision(self) -> Tensor:
        """The context (B, D) to see with."""
        if self.appearance is None:
            return self.engine.context(self.belief)[:, -1]
        contexts, self.look = self.appearance.sequence(self.vae.patches(self.frame)[:, None], self.look)
        return contexts[:, 0]

    def _random(self) -> Tensor:
        shape, device = (len(self.frame),), self.frame.device
        return torch.randint(self.engine.actions, shape, generator=self.generator, device=device)


class RandomAgent:
    """Acts at random, by a seed, with `actions` to choose from: the bottom of the scale."""

    def __init__(self, seed: int, actions: int = 4) -> None:
        self.seed, self.actions = seed, actions

    def begin(self, frames: Tensor) -> None:
        """Begin with the same luck in every lifetime."""
        self.batch, self.device = len(frames), frames.device
        self.generator = seeded(self.seed, stream=2, device=self.device)

    def act(self) -> Tensor:
        """Actions (B,) int64, all equally likely."""
        return torch.randint(self.actions, (self.batch,), generator=self.generator, device=self.device)

    def observe(self, action: Tensor, step: WorldStep) -> None:
        """Learn nothing."""


class KnownRuleAgent:
    """The planner that knows the hidden rule: the top of the scale. Privileged, as are all agents that take a world.

    Args:
        world: the world it acts in, which it may read.
        q: what moves are worth in such worlds.
    """

    def __init__(self, world: HiddenRulesWorld, q: ActionValues) -> None:
        self.world, self.q = world, q

    def begin(self, frames: Tensor) -> None:
        """Nothing to forget."""

    def observe(self, action: Tensor, step: WorldStep) -> None:
        """Nothing to learn."""

    def assumed_task(self) -> Tensor:
        """The tasks (B,) int64 to plan for."""
        return self.world.task

    def act(self) -> Tensor:
        """The best actions (B,) int64 if the assumed tasks were true."""
        return self.values().argmax(1)

    def values(self) -> Tensor:
        """Q (B, A) float32 if the assumed tasks were true."""
        task = self.assumed_task()
        rule = self.world.space.rule(task)
        position = by_role(self.world.by_colour(self.world.position), rule)
        return self.q(self.world, task, position).gather(1, rule.action_map)


class ThompsonAgent(KnownRuleAgent):
    """Thompson sampling on the exact filter: plans for one rule drawn anew from the posterior at every step.

    Args:
        seed: of the draws.
        options: of the `ExactFilter`.
    """

    def __init__(self, world: HiddenRulesWorld, q: ActionValues, seed: int, **options: float) -> None:
        super().__init__(world, q)
        self.filter = ExactFilter(world, **options)
        self.generator = seeded(seed, stream=3, device=world.device)

    def begin(self, frames: Tensor) -> None:
        """Draw the first assumption from the prior."""
        self.filter.begin(frames)
        self.assumed = self._draw()

    def observe(self, action: Tensor, step: WorldStep) -> None:
        """Update the posterior, and draw again."""
        self.filter.observe(action, step)
        self.assumed = self._draw()

    def assumed_task(self) -> Tensor:
        """The tasks (B,) int64 drawn last."""
        return self.assumed

    def _draw(self) -> Tensor:
        return self.draw_task(self.filter.log_posterior)

    def draw_task(self, log_posterior: Tensor) -> Tensor:
        """One task (n,) int64 of each of the log posteriors (n, rules): wind and edges first, then the rest, because to draw
        among few is much cheaper than among all."""
        by_weather = log_posterior.unflatten(1, (-1, self.world.space.pairs))
        weather = torch.zeros(len(by_weather), 1, dtype=torch.int64, device=by_weather.device)
        if by_weather.shape[1] > 1:
            weather = torch.multinomial(by_weather.logsumexp(2).exp(), 1, generator=self.generator)
        pairs = by_weather.take_along_dim(weather[..., None], 1)[:, 0]
        pair = torch.multinomial(pairs.exp(), 1, generator=self.generator)
        return (weather * self.world.space.pairs + pair)[:, 0]


class BayesAdaptiveAgent(ThompsonAgent):
    """Bayes-adaptive rollouts: tries every action in imagined lifetimes, each under a rule drawn from the exact
    posterior and continued by Thompson sampling, and takes the action with the best mean.

    One step of policy improvement on Thompson sampling in the Bayes-adaptive decision process (Bertsekas and Castanon,
    "Rollout Algorithms", 1999; root sampling as in Guez et al., "BAMCP", 2012): what it earns bounds the Bayes optimum
    from below. Where the posterior is certain nothing is imagined, because there is nothing to find out.

    Args:
        world, q, seed: as in `ThompsonAgent`.
        rollouts: imagined lifetimes for each action, at least 1; all actions meet the same rules and the same luck.
        horizon: steps of each, at least 1; from there on counts what the drawn rule's own planner expects.
        certain: nats of entropy below which the posterior counts as certain.
    """

    AT_ONCE = 8192 * 144  # numbers in the posteriors of imagined lifetimes; bounds memory

    def __init__(
        self, world: HiddenRulesWorld, q: ActionValues, seed: int, rollouts: int = 64, horizon: int = 16, certain: float = 0.01
    ) -> None:  # fmt: skip
        super().__init__(world, q, seed)
        self.rollouts, self.horizon, self.certain = rollouts, horizon, certain
        self.imagined = 0  # worlds so far, and so the seed of the next

    def begin(self, frames: Tensor) -> None:
        """Begin as Thompson sampling does."""
        super().begin(frames)
        self.left = self.world.settings.lifetime

    def observe(self, action: Tensor, step: WorldStep) -> None:
        """Update the posterior."""
        super().observe(action, step)
        self.left -= 1

    def act(self) -> Tensor:
        """The actions (B,) int64 with the best mean; Thompson sampling's where the posterior is certain."""
        action = super().act()
        unsure = (torch.special.entr(self.filter.log_posterior.exp()).sum(1) > self.certain).nonzero()[:, 0]
        some = max(1, self.AT_ONCE // (len(self.world.space) * self.rollouts))
        for rows in unsure.split(some) if len(unsure) else ():
            action[rows] = self._mean_returns(rows).argmax(1)
        return action

    def _mean_returns(self, rows: Tensor) -> Tensor:
        """Means (n, A) over the imagined lifetimes of worlds `rows` (n,) that begin with each action."""
        each = rows.repeat_interleave(self.rollouts)
        log_posterior = self.filter.log_posterior[each]
        task = self.draw_task(log_posterior)
        position = by_role(self.world.by_colour(self.world.position)[each], self.world.space.rule(task))  # if that rule held
        unseen = replace(self.world.settings, noise=0, switch=0, switch_step=0)  # rules last for as long as it imagines
        self.imagined += 1
        means = []
        walls = None if self.world.walls is None else self.world.walls[each]
        for action in range(self.world.settings.actions):
            world = HiddenRulesWorld(unseen, len(each), task, self.imagined, self.world.device)
            world.place(task, position, self.world.age[each], walls)
            returns = self._imagine(world, torch.full_like(task, action), log_posterior)
            means.append(returns.view(len(rows), self.rollouts).mean(1))
        return torch.stack(means, 1)

    def _imagine(self, world: HiddenRulesWorld, action: Tensor, log_posterior: Tensor) -> Tensor:
        """Returns (N,) of imagined worlds that begin with `action` (N,) under log posteriors (N, rules)."""
        agent = ThompsonAgent(world, self.q, self.imagined)
        agent.begin(action)  # instead of pictures, of which it only counts the rows
        agent.filter.log_posterior = log_posterior
        earned = torch.zeros(world.batch, device=world.device)
        for _ in range(min(self.horizon, self.left)):
            step = world.step_unseen(action)
            agent.observe(action, step)
            earned, action = earned + step.reward, agent.act()
        if self.left > self.horizon:
            earned += KnownRuleAgent(world, self.q).values().amax(1)
        return earned


def references(
    settings: WorldSettings, lifetimes: int, split: Split, seed: int, device: torch.device, rollouts: int = 0
) -> dict[str, Lifetimes]:  # fmt: skip
    """The lifetimes of the agents to compare with, all in the same worlds: random, Thompson sampling, the known
    rule; where rules switch Thompson sampling that expects no switch, its likelihoods floored at .001; and with
    `rollouts` above 0 the Bayes-adaptive agent, which takes minutes to hours."""
    q = ActionValues(settings, device=device)

    def live(make: Callable) -> Lifetimes:
        world = HiddenRulesWorld(settings, lifetimes, split, seed, device)
        return play(world, make(world))

    lived = {
        "random": live(lambda world: RandomAgent(seed, settings.actions)),
        "thompson": live(lambda world: ThompsonAgent(world, q, seed)),
        "known_rule": live(lambda world: KnownRuleAgent(world, q)),
    }
    if settings.switch:
        lived["expects_no_switch"] = live(lambda world: ThompsonAgent(world, q, seed, switch=0, floor=1e-3))
    if rollouts > 0:
        lived["bayes_adaptive"] = live(lambda world: BayesAdaptiveAgent(world, q, seed, rollouts))
    return lived


# --------------------------------------------------------------------------------------------------- lifetimes and scores


class Lifetimes(NamedTuple):
    """What happened in B lifetimes of T steps, on the CPU."""

    reward: Tensor
    """(B, T) float32."""
    terminated: Tensor
    """(B, T) bool."""
    truncated: Tensor
    """(B, T) bool."""
    segment: Tensor
    """(B, T) int64: number of the rule that the step was lived under."""


def play(world: HiddenRulesWorld | GymWorlds, agent: Any, watchers: Sequence[Any] = ()) -> Lifetimes:
    """Let `agent` (see agent.Agent) live one lifetime in every world; watchers `begin` and `observe` along."""
    frames = world.reset()
    for listener in (agent, *watchers):
        listener.begin(frames)
    happened = []
    for _ in range(world.settings.lifetime):
        action = agent.act()
        step = world.step(action)
        for listener in (agent, *watchers):
            listener.observe(action, step)
        happened.append((step.reward, step.terminated, step.truncated, world.lived_segment))
    return Lifetimes(*(torch.stack(part, 1).cpu() for part in zip(*happened)))


def interval(statistic: Callable[..., np.ndarray], *strata: np.ndarray) -> list[float | None]:
    """95% percentile bootstrap interval of `statistic`, stratified by run (Agarwal et al., "Statistical Precipice", 2021).

    Runs are evaluated in the same worlds. So lifetimes are drawn once for all strata and all quantities together:
    whatever luck the runs share must not count as evidence as many times as there are runs.

    Args:
        statistic: of k arrays (..., runs * n), reduces their last axis.
        strata: (k, n) each, k quantities of n lifetimes; one stratum for each run.

    Returns:
        low and high; None where the statistic has no number, such as a ratio to nothing.
    """
    together = np.stack(strata, 1)  # (k, runs, n)

    def of_rows(rows: np.ndarray, axis: int) -> np.ndarray:
        drawn = np.moveaxis(together[:, :, rows], 1, -2)  # (k, ..., runs, n)
        return statistic(*drawn.reshape(*drawn.shape[:-2], -1))

    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings(action="ignore"):
        found = scipy.stats.bootstrap(
            [np.arange(together.shape[-1])], of_rows, n_resamples=2000, batch=100, method="percentile", vectorized=True,
            rng=np.random.default_rng(0),
        )  # fmt: skip
    ends = found.confidence_interval.low, found.confidence_interval.high
    return [float(end) if np.isfinite(end) else None for end in ends]


def mean(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    return x.mean(-1)


def interquartile_mean(x: np.ndarray) -> np.ndarray:
    """IQM over the last axis: the mean of the middle half."""
    return scipy.stats.trim_mean(x, 0.25, axis=-1)


def ratio(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of two means over the last axis."""
    return x.mean(-1) / y.mean(-1)


def normalised(x: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Where the mean of x lies between those of low (0) and high (1)."""
    return (x.mean(-1) - low.mean(-1)) / (high.mean(-1) - low.mean(-1))


def improvement(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Probability that x is above y in the same lifetime, a tie counting half."""
    return (x > y).mean(-1) + 0.5 * (x == y).mean(-1)


STATISTICS: dict[str, tuple[Callable[..., np.ndarray], str, tuple[str, ...]]] = {
    "return_mean": (mean, "returns", ("agent",)),
    "return_iqm": (interquartile_mean, "returns", ("agent",)),
    "normalised": (normalised, "returns", ("agent", "random", "known_rule")),
    "of_thompson": (ratio, "returns", ("agent", "thompson")),
    "improvement": (improvement, "returns", ("agent", "thompson")),
    "late_of_known_rule": (ratio, "late_returns", ("agent", "known_rule")),
}
"""What is said of an agent beside the references: the statistic, of which quantity of a lifetime, and of whom."""
HEADS = {
    "return_mean": "return", "return_iqm": "IQM", "normalised": "normalised", "of_thompson": "of Thompson",
    "improvement": "above Thompson", "late_of_known_rule": "last eighth, of known rule",
}  # fmt: skip


def told(result: dict[str, Any]) -> list[str]:
    """Which of STATISTICS an evaluation can tell: those whose agents lived."""
    return [name for name, (_, quantity, whose) in STATISTICS.items() if set(whose) <= set(result[quantity])]


def statistics(*results: dict[str, Any]) -> dict[str, Any]:
    """Every one of STATISTICS with its interval, of one evaluation or of several runs' in the same worlds together."""
    said = {}
    for name in told(results[0]):
        statistic, quantity, whose = STATISTICS[name]
        strata = [np.array([result[quantity][agent] for agent in whose], float) for result in results]
        with np.errstate(divide="ignore", invalid="ignore"):
            value = float(statistic(*np.concatenate(strata, -1)))
        said[name], said[f"{name}_ci95"] = value if np.isfinite(value) else None, interval(statistic, *strata)
    return said


def compare(lived: dict[str, Lifetimes]) -> dict[str, Any]:
    """Agents that lived the same lifetimes: a `summary` of each, `returns` and `late_returns` (of the last eighth of the
    steps) of every lifetime, and the agent's `statistics` beside random, thompson and known_rule."""
    late = -max(1, lived["agent"].reward.shape[1] // 8)
    result = {name: summary(one) for name, one in lived.items()} | {
        "returns": {name: one.reward.sum(1).tolist() for name, one in lived.items()},
        "late_returns": {name: one.reward[:, late:].sum(1).tolist() for name, one in lived.items()},
    }
    return result | statistics(result)


def summary(lifetimes: Lifetimes) -> dict[str, Any]:
    """Return (mean, interquartile mean, intervals) and counts a lifetime; `by_step` is each step's mean
    reward, `by_step_error` its standard error; `by_episode` see there."""
    reward = lifetimes.reward.double()
    returns = reward.sum(1).numpy()
    return {
        "return_mean": float(returns.mean()),
        "return_iqm": float(interquartile_mean(returns)),
        "return_mean_ci95": interval(mean, returns[None]),
        "return_iqm_ci95": interval(interquartile_mean, returns[None]),
        "by_step": reward.mean(0).tolist(),
        "by_step_error": (reward.std(0) / len(returns) ** 0.5).tolist(),
        "goals": float((reward > 0).double().sum(1).mean()),
        "hazards": float((reward < 0).double().sum(1).mean()),
        "timeouts": float(lifetimes.truncated.double().sum(1).mean()),
        "by_episode": by_episode(lifetimes),
    }


def by_episode(lifetimes: Lifetimes) -> dict[str, list[float]]:
    """Adaptation from episode to episode, for those numbers of which nine lifetimes in ten saw the end.

    Shares of the first, second, ... episodes that ended on the goal (`success`), the hazard (`hazard`) or by the time
    limit (`timeout`), and the mean steps of those that reached the goal (`steps_to_goal`, 0 where none did).
    """
    ended = lifetimes.terminated | lifetimes.truncated
    row, step = ended.nonzero(as_tuple=True)
    number = (ended.long().cumsum(1) - 1)[row, step]
    begun = torch.cat([torch.zeros(1, dtype=torch.int64), step[:-1] + 1]).masked_fill(number == 0, 0)[: len(step)]
    count = lambda which: number[which].bincount(minlength=ended.shape[1]).double()  # noqa: E731
    reached = lifetimes.reward[row, step] > 0
    goals, hazards = count(reached), count(lifetimes.reward[row, step] < 0)
    spent = number[reached].bincount((step - begun + 1)[reached].double(), minlength=ended.shape[1])
    all_, known = count(slice(None)), int((count(slice(None)) >= 0.9 * len(ended)).sum())
    shares = {
        "success": goals / all_, "hazard": hazards / all_, "timeout": count(lifetimes.truncated[row, step]) / all_,
        "steps_to_goal": spent / goals.clamp_min(1),
    }  # fmt: skip
    return {name: share[:known].tolist() for name, share in shares.items()}


def shown(value: float | None, ends: Sequence[float | None], digits: int) -> str:
    """A figure with its 95% interval; a dash where there is no number."""
    if None in (value, *ends):
        return "-" if value is None else f"{value:.{digits}f}"
    return f"{value:.{digits}f} [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"


AGENTS = {"agent": "agent", "thompson": "Thompson sampling", "known_rule": "known rule", "random": "random"}


def present(results: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Those of AGENTS that lived: a world of other people's has no exact solution."""
    return {name: label for name, label in AGENTS.items() if name in results[0]}


def report(result: dict[str, Any]) -> str:
    """An evaluation in a few lines."""
    lines = [f"{result['lifetimes']} lifetimes on the {result['split']} split, return per lifetime [95% interval]:"]
    for name in present([result]):
        lines.append(f"  {name:18s} {shown(result[name]['return_mean'], result[name]['return_mean_ci95'], 2)}")
    for name in told(result):
        if not name.startswith("return"):
            lines.append(f"  {name:18s} {shown(result[name], result[name + '_ci95'], 3)}")
    nats = result["belief_nats"]
    if nats["late_excess"] is not None:
        lines.append(f"  belief: {nats['late_excess']:+.3f} nats a step over the exact filter from step {nats['late']} on")
    return "\n".join(lines)


def result_table(results: Sequence[dict[str, Any]], joined: dict[str, Any]) -> str:
    """Markdown: a line for each evaluation, one for all of them (`statistics`), and the references below."""
    names = told(results[0])
    heads = ["seed", *(HEADS[name] for name in names), "belief, nats over exact", "training"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for result in [*results, joined] if len(results) > 1 else results:
        figures = [shown(result[name], result[f"{name}_ci95"], 2 if name.startswith("return") else 3) for name in names]
        one = result is not joined
        excess = result["belief_nats"]["late_excess"] if one else None
        rest = ["-" if excess is None else f"{excess:+.3f}", f"{result['seconds']:.0f} s"] if one else ["", ""]
        lines.append("| " + " | ".join([str(result["seed"]) if one else f"all {len(results)}", *figures, *rest]) + " |")
    first, means = results[0], [result["return_mean"] for result in results]
    bars = {name: label for name, label in present(results).items() if name != "agent"}
    said = [f"{label} {shown(first[name]['return_mean'], first[name]['return_mean_ci95'], 2)}" for name, label in bars.items()]
    text = f"{first['lifetimes']} lifetimes on the {first['split']} split for each agent; {', '.join(said)}"
    if first["references"] and "bayes_adaptive" in first["references"]["agents"]:
        deep = first["references"]["agents"]["bayes_adaptive"]
        text += f", Bayes-adaptive rollouts {shown(deep['return_mean'], deep['return_mean_ci95'], 2)} "
        text += f"({first['references']['lifetimes']} lifetimes, {first['references']['rollouts']} rollouts an action)"
    if len(results) > 1:
        spread = scipy.stats.t.ppf(0.975, len(means) - 1) * scipy.stats.sem(means)
        text += f"; over seeds the mean return is {np.mean(means):.2f} +- {spread:.2f} (95%, Student's t of {len(means)} runs)"
    return "\n".join(lines) + f"\n\n{text}."


def episode_table(results: Sequence[dict[str, Any]], numbers: Sequence[int] = (1, 2, 3, 4, 6, 8, 12)) -> str:
    """Markdown: how the first, second, ... episode of a lifetime ends, for every agent, averaged over evaluations."""
    lines = ["| agent | episode | goal | hazard | time-out | steps to the goal |", "|" + "---|" * 6]
    for name, label in present(results).items():
        curves = {kind: [result[name]["by_episode"][kind] for result in results] for kind in results[0][name]["by_episode"]}
        for number in numbers:
            if number <= min(map(len, curves["success"])):
                means = {kind: np.mean([curve[number - 1] for curve in each]) for kind, each in curves.items()}
                shares = " | ".join(f"{means[kind]:.1%}" for kind in ("success", "hazard", "timeout"))
                lines.append(f"| {label} | {number} | {shares} | {means['steps_to_goal']:.1f} |")
    return "\n".join(lines)


def draw_curve(axes: Axes, by_step: Sequence[float], error: Sequence[float], label: str, bin_steps: int = 4) -> None:
    """Reward by step of the lifetime, averaged over `bin_steps`, with the 95% interval that standard errors `error` give."""
    steps = len(by_step) // bin_steps * bin_steps
    binned = np.reshape(by_step[:steps], (-1, bin_steps)).mean(1)
    width = 1.96 * np.sqrt(np.square(error[:steps]).reshape(-1, bin_steps).sum(1)) / bin_steps
    at = (np.arange(len(binned)) + 0.5) * bin_steps
    (line,) = axes.plot(at, binned, label=label)
    axes.fill_between(at, binned - width, binned + width, alpha=0.2, color=line.get_color())
    axes.set(xlabel="step of the lifetime", ylabel="reward a step")


def draw_adaptation(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Reward by step of the lifetime for every agent, averaged over the evaluations, to `path` (PNG); see `draw_curve`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes, runs = figure.subplots(), len(results)
    for name, label in present(results).items():
        rewards = np.mean([result[name]["by_step"] for result in results], 0)
        error = np.sqrt(np.square([result[name]["by_step_error"] for result in results]).sum(0)) / runs
        returns = np.mean([result[name]["return_mean"] for result in results])
        draw_curve(axes, rewards, error, f"{label}: {returns:.2f}")
    title = f"{results[0]['lifetimes']} lifetimes, {results[0]['split']} tasks" + (f", {runs} runs" if runs > 1 else "")
    axes.set_title(title)
    axes.legend(title="return per lifetime", loc="lower right", fontsize="small")
    figure.savefig(path, dpi=120)


def draw_episodes(results: Sequence[dict[str, Any]], path: Path) -> None:
    """How episodes end, and steps to the goal, by number of the episode, averaged over the evaluations, to `path` (PNG)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.8), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 4), ("success", "hazard", "timeout", "steps_to_goal")):
        for name, label in present(results).items():
            curves = [result[name]["by_episode"][kind] for result in results]
            length = min(map(len, curves))
            axes.plot(range(1, length + 1), np.mean([curve[:length] for curve in curves], 0), marker=".", label=label)
        axes.set(title=kind.replace("_", " "), xlabel="episode of the lifetime")
        axes.set_ylim(bottom=0)
    axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)


Moment = tuple[np.ndarray, np.ndarray, np.ndarray, str]
"""Of one step: the picture seen and its reconstruction (H, W, 3), the belief (action, outcome) as probabilities, a heading."""


class LifetimeFigure:
    """A figure that shows one moment of a lifetime after the other, with a caption under all of them."""

    def __init__(self, first: Moment, caption: str) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(6, 5.6), dpi=100)
        self.canvas = FigureCanvasAgg(self.figure)
        parts = self.figure.subplot_mosaic([["seen", "rebuilt"], ["belief", "belief"]], height_ratios=[3, 1.5])
        self.figure.subplots_adjust(left=0.08, right=0.97, top=0.88, bottom=0.13, hspace=0.2, wspace=0.06)
        for name, title in (("seen", "seen"), ("rebuilt", "reconstruction")):
            parts[name].set(title=title, xticks=[], yticks=[])
        title = "belief: which outcome each action has"
        parts["belief"].set(title=title, ylabel="action", xticks=[], yticks=range(len(first[2])))
        self.images = [parts[name].imshow(image) for name, image in (("seen", first[0]), ("rebuilt", first[1]))]
        self.images.append(parts["belief"].imshow(first[2], vmin=0, vmax=1, aspect="auto", cmap="magma"))
        self.heading = self.figure.suptitle(first[3])
        self.figure.text(0.5, 0.03, caption, ha="center", fontsize="small")

    def show(self, moment: Moment) -> None:
        """Put another moment in the place of the last."""
        for image, content in zip(self.images, moment):
            image.set_data(content)
        self.heading.set_text(moment[3])

    def picture(self) -> np.ndarray:
        """What it shows now, (height, width, 3) uint8."""
        self.canvas.draw()
        return np.asarray(self.canvas.buffer_rgba())[..., :3]


def draw_lifetime(moments: Iterable[Moment], caption: str, path: Path, fps: int) -> None:
    """A lifetime as an animation to `path`, .gif or .mp4, atomically; it is lived when the ending is known to be one of them.

    Raises:
        UserError: another ending, or an MP4 where ffmpeg is missing.
    """
    import matplotlib
    from matplotlib import animation

    if path.suffix == ".mp4":
        if importlib.util.find_spec("imageio_ffmpeg"):  # brings an ffmpeg along
            import imageio_ffmpeg

            matplotlib.rcParams["animation.ffmpeg_path"] = imageio_ffmpeg.get_ffmpeg_exe()
        if not animation.FFMpegWriter.isAvailable():
            raise UserError("an MP4 needs ffmpeg: pip install imageio-ffmpeg, or name a file that ends in .gif.")
    elif path.suffix != ".gif":
        raise UserError(f"{path} ends neither in .gif nor in .mp4: choose one of them.")
    moments = list(moments)
    figure = LifetimeFigure(moments[0], caption)
    writer = animation.FFMpegWriter(fps=fps) if path.suffix == ".mp4" else animation.PillowWriter(fps=fps)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    film = animation.FuncAnimation(figure.figure, figure.show, moments, init_func=lambda: None, cache_frame_data=False)
    film.save(temporary, writer=writer, dpi=70)
    temporary.replace(path)


def show_lifetime(moments: Iterator[Moment], caption: str, fps: int) -> bool:
    """A lifetime in a window while it is lived, until its end or until the window is closed; False, and nothing is lived, if the
    display turns out to be none. Needs pygame, which Gymnasium's human mode uses too."""
    import pygame

    try:
        pygame.display.init()
    except pygame.error:
        return False
    if pygame.display.get_driver() in ("offscreen", "dummy") and "SDL_VIDEODRIVER" not in os.environ:
        return False
    clock, screen, figure = pygame.time.Clock(), None, None
    for moment in moments:
        figure = figure or LifetimeFigure(moment, caption)
        figure.show(moment)
        picture = figure.picture()
        screen = screen or pygame.display.set_mode(picture.shape[1::-1])
        screen.blit(pygame.surfarray.make_surface(picture.swapaxes(0, 1)), (0, 0))
        pygame.display.flip()
        clock.tick(fps)
        if any(event.type == pygame.QUIT for event in pygame.event.get()):
            break
    pygame.display.quit()
    return True
