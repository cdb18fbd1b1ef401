"""Agents: the controller that infers, plans and acts, reference agents on the exact filter; how lifetimes compare.

Every agent answers `begin(frames)`, `act() -> actions` and `observe(actions, step)`; `play` drives any of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from context_engine import AppearanceEngine, ContextInferenceEngine
from environment import GymWorlds, HiddenRulesWorld, WorldSettings, make_worlds
from memory import (
    EpisodicMemory, Experience, LifetimeStore, Processes, RunFolder, UserError, WorldStep, forget_blocks, require, require_all, seeded, tensor_of,
)  # fmt: skip
from transition_model import ModeTable, TransitionModel, TransitionSettings, Value, entropy, merged, pairs_present
from world_model import VAE


@dataclass(frozen=True)
class PlannerSettings:
    """Planning and the value."""

    discount: float = 0.95
    """Of rewards, for each step, in (0, 1)."""
    mass: float = 0.85
    """Probability, in (0, 1], of the imagined outcomes that are followed; the least likely are left out."""
    promising: float = 0.2
    """Actions whose value comes within this of the best one's are looked at a second step ahead; 0 for none."""
    likely: float = 0.3
    """And there only steps whose probability that the episode goes on behind them is above this, in [0, .999]."""
    keypoints: int = 8
    """Points that the value finds in the grid, at least 1."""
    width: int = 192
    """Hidden features of the value, at least 1."""
    trace: float = 0.8
    """Lambda of the returns that the value learns from, in [0, 1]."""
    slow: float = 0.2
    """Share of the way that the slow value goes towards the learnt one at each update, in (0, 1]."""
    learning_rate: float = 4e-3
    """Adam's, of the value; it decays with the run."""

    def __post_init__(self) -> None:
        require_all(
            "planner", self, discount=(1e-3, 0.9999), mass=(1e-6, 1), promising=(0, 1e6), likely=(0, 0.999),
            keypoints=(1, 1024), width=(1, 4096), trace=(0, 1), slow=(1e-6, 1), learning_rate=(0, 1),
        )  # fmt: skip


class Expansion(NamedTuple):
    """What may happen next in B states: P likely effects in all, each shared by the actions that may have it."""

    probability: Tensor
    """(B, A, K) float: of every effect after every action, renormalised over the likeliest."""
    state: Tensor
    """(P,) int64: which state the effect starts from."""
    effect: Tensor
    """(P,) int64: which effect it is, 0 to K - 1."""
    next_codes: Tensor
    """(P, S) uint8: the grid of codes that it leads to."""
    reward: Tensor
    """(P,) float: expected."""
    end: Tensor
    """(P,) float: probability that the episode ends."""
    reset_value: Tensor
    """(P,) float: W, the value of a new episode."""
    next_value: Tensor
    """(P,) float: V, the value of going on."""


class Planner:
    """Search under the present belief: one step, a second one where it may change the choice, then the learnt value.

        Q(z, a) = sum_k pi(k|a, c) [ r(z, z'_k, c) + discount ((1 - e) U(z'_k) + e W(c)) ]

    z'_k is the likeliest grid under effect k, r the expected reward, e the probability that the episode ends. U is the learnt
    V(z', c), and behind likely effects of actions whose value is close to the best one's max_a' Q(z', a'), with V below it.
    The belief does not change inside the plan: what information is worth enters through V and W alone, which were learnt over
    beliefs. Source: Russell and Wefald, 1991 (search where it may change the decision).
    """

    STATES_AT_ONCE = 256  # bounds memory while the belief is still vague and many effects are likely

    def __init__(self, settings: PlannerSettings, transition: TransitionModel, value: Value) -> None:
        self.settings, self.transition, self.value = settings, transition, value

    @torch.inference_mode()  # a decision for one world takes an eighth less than with no_grad: less to note down
    def action_values(self, codes: Tensor, context: Tensor, depth: int = 2, modes: Callable | None = None) -> Tensor:
        """Q (B, A) of code grids (B, S) uint8 under contexts (B, A + 1, D).

        Args:
            depth: 1 or 2 steps.
            modes: a `ModeTable`, for as long as the outcomes do not learn.
        """
        modes = modes or self.transition.outcome_network.modes
        parts = zip(codes.split(self.STATES_AT_ONCE), context.split(self.STATES_AT_ONCE))
        return torch.cat([self._search(*part, depth, modes) for part in parts])

    def _search(self, codes: Tensor, context: Tensor, depth: int, modes: Callable) -> Tensor:
        expansion = self._expand(codes, context, modes)
        q = self._back_up(expansion, expansion.next_value)
        if depth == 1:
            return q
        # Expand a second step where it may change the choice: behind likely effects of the actions close to the best.
        candidate = q > q.amax(1, keepdim=True) - self.settings.promising
        candidate &= (candidate.sum(1) > 1)[:, None]  # one candidate: nothing to choose
        going_on = expansion.probability[expansion.state, :, expansion.effect] * (1 - expansion.end)[:, None]  # (P, A)
        deeper = (candidate[expansion.state] & (going_on > self.settings.likely)).any(1).nonzero()[:, 0]
        if len(deeper) == 0:
            return q
        below = self.action_values(expansion.next_codes[deeper], context[expansion.state[deeper]], depth - 1, modes)
        next_value = expansion.next_value.index_copy(0, deeper, below.amax(1))
        return self._back_up(expansion, next_value)

    def loss(self, value: Value, experience: Experience, context: Tensor) -> dict[str, Tensor]:
        """Learn what states and fresh episodes are worth, from stored lifetimes and the planner's own look-ahead.

        Along each lifetime, backwards, with the slow value V-, W- (the planner's) and e_t = the episode ended at t:

            boot_t = lambda g_t+1 + (1 - lambda) after_t,    after_t = W-(c_t+1) if e_t else V-(z'_t, c_t+1)
            g_t    = (r_t + discount boot_t + max_a Q_t) / 2  where the action taken was the planner's choice,
                     max_a Q_t                                where it was not
            loss   = mean (V(z_t, c_t) - g_t)^2 + mean over first steps of episodes (W(c_t) - g_t)^2

        Time limits end episodes but not the lifetime, so they too lead to W. Q is searched to depth 1, because depth 2
        would cost several times as much.

        Args:
            value: learns.
            experience: (B, T, ...); context: (B, T + 1, A + 1, D), without gradient.

        Returns:
            scalars by name: value and fresh, mean squared errors in squared units of reward.
        """
        B, T = experience.action.shape
        slow = self.value
        codes, ended = experience.codes.flatten(0, 1), experience.ended
        best, choice = self.action_values(codes, context[:, :-1].flatten(0, 1), depth=1).view(B, T, -1).max(-1)
        with torch.no_grad():
            pooled = slow.pool(context[:, 1:].flatten(0, 1))
            onward = slow(slow.statistics(experience.next_codes.flatten(0, 1)), pooled).view(B, T)
            after = torch.where(ended, slow.fresh(pooled).view(B, T), onward)
        target, following = torch.zeros_like(best), after[:, -1]
        for t in reversed(range(T)):
            boot = self.settings.trace * following + (1 - self.settings.trace) * after[:, t]
            taken = 0.5 * (experience.reward[:, t] + self.settings.discount * boot) + 0.5 * best[:, t]
            following = torch.where(experience.action[:, t] == choice[:, t], taken, best[:, t])
            target[:, t] = following
        first = torch.ones_like(ended)
        first[:, 1:] = ended[:, :-1]
        pooled = value.pool(context[:, :-1].flatten(0, 1))
        predicted = value(value.statistics(codes), pooled).view(B, T)
        return {
            "value": F.mse_loss(predicted, target),
            "fresh": F.mse_loss(value.fresh(pooled[first.flatten()]), target[first]),
        }

    def _expand(self, codes: Tensor, context: Tensor, modes: Callable) -> Expansion:
        """The likely effects in states (B, S) under contexts (B, A + 1, D)."""
        transition, value = self.transition, self.value
        grids, first = modes(codes)  # (B, K, S), (B, K)
        prior = merged(transition.log_prior(context[:, :-1]).exp(), first)  # outcomes that look alike from here are one
        kept, probability = branch(prior, self.settings.mass)  # (B, A, K)
        state, effect = kept.any(1).nonzero(as_tuple=True)  # (P,)
        next_codes = grids[state, effect]
        present = pairs_present(codes[state], next_codes, transition.codes)
        log_reward, end = transition.consequences(present, context[:, -1], state)
        pooled = value.pool(context)
        return Expansion(
            probability=probability, state=state, effect=effect, next_codes=next_codes,
            reward=log_reward.exp() @ transition.reward_bins, end=torch.sigmoid(end),
            reset_value=value.fresh(pooled)[state], next_value=value(value.statistics(next_codes), pooled, state),
        )  # fmt: skip

    def _back_up(self, expansion: Expansion, next_value: Tensor) -> Tensor:
        """Q (B, A) from what going on is worth after each effect, next_value (P,)."""
        following = torch.lerp(next_value, expansion.reset_value, expansion.end)
        q_effect = expansion.probability.new_zeros(expansion.probability[:, 0].shape)  # (B, K)
        q_effect[expansion.state, expansion.effect] = expansion.reward + self.settings.discount * following
        return (expansion.probability * q_effect[:, None]).sum(-1)


def branch(probability: Tensor, mass: float) -> tuple[Tensor, Tensor]:
    """Which entries (bool) of probabilities (..., n) make up the smallest set of at least `mass`, and these
    renormalised to one."""
    ordered, index = probability.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = torch.zeros_like(probability, dtype=torch.bool).scatter_(-1, index, (before < mass) & (ordered > 0))
    weight = probability * kept
    return kept, weight / weight.sum(-1, keepdim=True)


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


class Agent(Protocol):
    """What `play` asks of an agent of B worlds."""

    def begin(self, frames: Tensor) -> None:
        """A lifetime begins with pictures (B, H, W, 3) uint8: forget the last one."""

    def act(self) -> Tensor:
        """Choose actions (B,) int64 on what was seen last."""

    def observe(self, action: Tensor, step: WorldStep) -> None:
        """Learn what actions (B,) led to."""


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


@dataclass(frozen=True)
class TrainingSettings:
    """The order and amount of meta-training. Perception and outcomes come first, then `updates` of the rest."""

    updates: int = 1000
    """Updates of context engine and value, at least 1: the length of the run."""
    worlds: int = 64
    """Lifetimes collected at once, at least 1."""
    random_lifetimes: int = 512
    """Lifetimes lived at random before anything is learnt; a multiple of `worlds`."""
    perception_updates: int = 150
    """Updates of the VAE alone, first."""
    outcome_updates: int = 600
    """Updates of the outcomes alone, second."""
    batch: int = 48
    """Stored lifetimes in an update of the context engine, at least 1."""
    value_batch: int = 16
    """Of these, lifetimes in an update of the value, at least 1 and at most `batch`."""
    outcome_batch: int = 8
    """Stored lifetimes in an update of the outcomes, at least 1."""
    picture_batch: int = 256
    """Stored pictures in an update of the VAE, at least 1."""
    value_from: int = 100
    """First update at which the value learns."""
    plan_from: int = 200
    """First update at which lifetimes are collected with the planner; before it random ones, a quarter as often."""
    collect_every: int = 16
    """Updates between collections of new lifetimes, at least 1."""
    outcome_every: int = 4
    """Updates between updates of the outcomes, at least 1."""
    perception_every: int = 8
    """Updates between updates of the VAE, at least 1."""
    exploration: float = 0.3
    """Share of random actions when planning begins, in [0, 1]; it falls evenly to `exploration_end`."""
    exploration_end: float = 0.03
    """Share of random actions at the end of the run, in [0, 1]."""
    final_rate: float = 0.1
    """Learning rates fall evenly to this share of their beginning, in [0, 1]."""
    evaluation_lifetimes: int = 4096
    """Held-out lifetimes that every agent lives in the final evaluation, at least 2."""
    log_every: int = 20
    """Updates between lines of metrics.jsonl, at least 1."""
    checkpoint_every: int = 200
    """Updates between checkpoints, at least 1."""

    def share(self, processes: int) -> TrainingSettings:
        """What each of several processes does of it; UserError unless they can do equally much."""
        whole = {name: getattr(self, name) for name in ("worlds", "batch", "value_batch", "outcome_batch", "picture_batch")}
        for name, number in whole.items():
            if number % processes:
                near = math.ceil(number / processes) * processes
                raise UserError(f"training.{name} is {number}, which {processes} processes cannot share equally: choose {near}.")
        parts = {name: number // processes for name, number in whole.items()}
        return dataclasses.replace(self, random_lifetimes=self.random_lifetimes // processes, **parts)

    def __post_init__(self) -> None:
        least_one = (
            "updates", "worlds", "random_lifetimes", "perception_updates", "outcome_updates", "batch", "value_batch",
            "outcome_batch", "picture_batch", "collect_every", "outcome_every", "perception_every", "log_every", "checkpoint_every",
        )  # fmt: skip
        require_all(
            "training", self, **dict.fromkeys(least_one, (1, 10**9)), value_from=(0, 10**9), plan_from=(0, 10**9),
            exploration=(0, 1), exploration_end=(0, 1), final_rate=(0, 1), evaluation_lifetimes=(2, 10**7),
        )  # fmt: skip
        require("training.value_batch", self.value_batch, 1, self.batch)
        if self.random_lifetimes % self.worlds:
            raise ValueError(
                f"training.random_lifetimes is {self.random_lifetimes}, but must be a multiple of training.worlds: "
                f"choose {math.ceil(self.random_lifetimes / self.worlds) * self.worlds}."
            )


@dataclass
class System:
    """The parts of an agent; main.py wires them."""

    settings: Any
    device: torch.device
    vae: VAE
    transition: TransitionModel
    engine: ContextInferenceEngine
    appearance: AppearanceEngine | None
    value: Value
    slow_value: Value
    planner: Planner

    def controller(self, kind: type = AgentController, **options: bool) -> AgentController:
        """An agent of these parts, of `AgentController` or a class of one's own; options are its constructor's."""
        parts = (self.vae, self.transition, self.engine, self.planner)
        return kind(*parts, lifetime=self.settings.world.lifetime, appearance=self.appearance, **options)

    def modules(self) -> dict[str, nn.Module]:
        """The parts with weights, by name."""
        names = ("vae", "transition", "engine", "appearance", "value", "slow_value")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def load(self, states: dict[str, dict]) -> None:
        """Take over the weights of all parts, from their `state_dict`s by name."""
        for name, module in self.modules().items():
            module.load_state_dict(states[name])


class Learner:
    """What meta-training does, step by step; everything that decides its future is in `state_dict`. The loop is `main.train`.

    Gradients do not cross: the VAE learns from pictures, the outcomes from codes, the context engine with prior and
    consequences from cached effect posteriors, the value from the planner's look-ahead. Several processes may each have one and learn together.
    """

    def __init__(self, system: System, processes: Processes | None = None) -> None:
        settings, device = system.settings, system.device
        self.processes = processes or Processes()
        self.training = settings.training.share(self.processes.count)
        self.settings, self.device, self.system = settings, device, system
        self.store = LifetimeStore(settings.memory, device, self.processes.rank, self.processes.count)
        self.generator = seeded(settings.seed, 4 + 100 * self.processes.rank, device)
        self.sampler = seeded(settings.seed, 5 + 100 * self.processes.rank)  # of stored lifetimes, on the CPU
        encoder = [p for name, p in self.system.vae.named_parameters() if name.startswith("encoder")]
        decoder = [p for name, p in self.system.vae.named_parameters() if not name.startswith("encoder")]
        transition, engine = self.system.transition, self.system.engine
        look = [{"params": self.system.appearance.parameters()}] if self.system.appearance else []
        groups = {
            "vae": [{"params": encoder}, {"params": decoder}, *look],
            "outcomes": transition.outcome_network.parameters(),
            "context": [*engine.parameters(), *transition.contextual_parameters()],
            "value": self.system.value.parameters(),
        }
        self.optimisers = {name: torch.optim.Adam(parameters, fused=True) for name, parameters in groups.items()}
        self.update = self.collections = self.env_steps = 0
        self.metrics: dict[str, Tensor] = {}
        self.seconds: dict[str, float] = {}

    @property
    def total(self) -> int:
        """Updates of all phases."""
        t = self.training
        return t.perception_updates + t.outcome_updates + t.updates

    def phase(self) -> tuple[str, int]:
        """The name of the present phase, and the number of the present update in it."""
        t = self.training
        left = self.update
        for name, updates in (("perception", t.perception_updates), ("outcomes", t.outcome_updates)):
            if left < updates:
                return name, left
            left -= updates
        return "adaptation", left

    def exploration(self, update: int) -> float:
        """The share of random actions in what is collected at an update of the adaptation: all of them before plans begin."""
        t = self.training
        if update < t.plan_from:
            return 1.0
        done = (update - t.plan_from) / max(1, t.updates - t.plan_from)
        return t.exploration + (t.exploration_end - t.exploration) * min(1.0, done)

    def inherit(self, run: RunFolder) -> None:
        """Begin where perception and outcomes are learnt, with the weights of `run`; UserError if sizes differ."""
        try:
            self.system.load(run.load()[0]["modules"])
        except (RuntimeError, KeyError) as error:
            raise UserError(f"{run.folder} has parts of other sizes: give the settings that it was trained with.") from error
        self.collect_random()
        self.update = self.training.perception_updates + self.training.outcome_updates

    def collect_random(self) -> None:
        """Live the random lifetimes that everything begins with."""
        while self.collections < self.training.random_lifetimes // self.training.worlds:
            self.collect(exploration=1.0)

    def collect(self, exploration: float) -> None:
        """Live new lifetimes in training tasks, with `exploration` of the actions at random, and store them."""
        s = self.settings
        # Another world for every collection of every process of every run.
        seed = (s.seed + 1) * 2**32 + self.processes.rank * 2**22 + self.collections
        with self.timed("collect"):
            world = make_worlds(s.world, self.training.worlds, "train", seed, self.device)
            agent = self.system.controller(keep_pictures=True, look_again=False)  # cheaper, and teaches as well
            agent.explore(exploration, self.generator)
            lifetimes = play(world, agent)
            self.store.add(agent.memory, world.task, lifetimes.segment, self.update)
        self.collections += 1
        self.env_steps += lifetimes.reward.numel() * self.processes.count
        self.metrics["return"] = lifetimes.reward.sum(1).mean()
        bins = s.transition.reward_bins
        if lifetimes.reward.min() < bins[0] or lifetimes.reward.max() > bins[-1]:
            ends = f"{bins[0]:g} to {bins[-1]:g}"
            warnings.warn(f"some rewards lie beyond transition.reward_bins, {ends}, and count as those: widen them.")

    def renew_all(self) -> None:
        """`renew` every block of the store."""
        for index in range(len(self.store.blocks)):
            self.renew(index)

    @torch.no_grad()
    def renew(self, index: int, rows_at_once: int = 8) -> None:
        """Let the present models see a block of the store again: its codes and effect posteriors."""
        system, block = self.system, self.store.blocks[index]
        with self.timed("renew"):
            experience = self.store.experience.rows(self.store.rows_of(index))
            if system.appearance:
                vision = torch.cat([self.appearances(frames.to(self.device)) for frames in block.frames.split(rows_at_once)])
            else:
                vision = system.engine.context(system.engine.sequence(experience)[:, :-1])[:, :, -1]  # (n, T, D)
            made = []
            for frames, arrivals, seen in zip(*(x.split(rows_at_once) for x in (block.frames, block.arrivals(), vision))):
                before, after = (
                    system.vae.encode(pictures.flatten(0, 1).to(self.device), seen.flatten(0, 1)) for pictures in (frames, arrivals)
                )
                likelihood = system.transition.outcome_network.log_likelihood(before, after)
                made.append((before, after, system.transition.effect_posterior(likelihood)))
            shape = experience.action.shape
            self.store.renew(index, *(torch.cat(parts).view(*shape, -1) for parts in zip(*made)), self.update)

    def appearances(self, frames: Tensor) -> Tensor:
        """Contexts (n, T, D) to see whole lifetimes of pictures (n, T, H, W, 3) with."""
        patches = self.system.vae.patches(frames.flatten(0, 1))
        return self.system.appearance.sequence(patches.view(*frames.shape[:2], *patches.shape[1:]))[0]

    def learn_perception(self, rows: Tensor, beliefs: Tensor | None = None) -> None:
        """One update of the VAE on pictures of lifetimes `rows`; without beliefs (B, T + 1, A + 1, H) under no context.

        Where the appearance is inferred, that learns along, from whole lifetimes of which sixteen pictures each are used.
        """
        size, system, lifetime = self.training.picture_batch, self.system, self.settings.world.lifetime
        with self.timed("vae"):
            which = torch.randint(len(rows), (size,), generator=self.sampler)
            step = torch.randint(lifetime, (size,), generator=self.sampler)
            if system.appearance:
                few, which = which[: -(-size // 16)], torch.arange(size) // 16
                every = torch.arange(lifetime).repeat(len(few))
                frames = self.store.frames_at(rows[few].repeat_interleave(lifetime), every).to(self.device)
                frames = frames.unflatten(0, (len(few), lifetime))
                frames, vision = frames[which, step], self.appearances(frames)[which, step]
            else:
                frames = self.store.frames_at(rows[which], step).to(self.device)
                vision = torch.zeros(size, self.settings.context.context, device=self.device)
                if beliefs is not None:
                    vision = system.engine.context(beliefs[which, step])[:, -1].detach()
            if self.update == 0:
                system.vae.seed_codes(self.processes.joined(frames), self.processes.joined(vision))
                self.processes.follow(system.vae)
            self._descend("vae", system.vae.loss(frames, vision), clip=1e4)

    def merge_codes(self, every: int = 16) -> None:
        """Perception is new: let its codes that stand for the same count as one, by every so many pictures of a block."""
        frames = self.store.blocks[0].frames.to(self.device)
        vision = torch.zeros(*frames.shape[:2], self.settings.context.context, device=self.device)
        if self.system.appearance:
            with torch.no_grad():
                vision = self.appearances(frames)
        seen = (self.processes.joined(x[:, ::every].flatten(0, 1)) for x in (frames, vision))
        self.system.vae.merge_codes(*seen)
        self.processes.follow(self.system.vae)

    def learn_outcomes(self, number: int) -> None:
        """Outcome update `number`: its phase follows from it."""
        t, transition = self.training, self.system.transition
        with self.timed("outcomes"):
            if transition.settings.splits_at(number):
                sample = self.store.experience.rows(self.store.sample(4 * t.outcome_batch, self.sampler))
                codes, next_codes = (self.processes.joined(x.flatten(0, 1)) for x in (sample.codes, sample.next_codes))
                transition.outcome_network.split(codes, next_codes, self.generator)
                self.processes.follow(transition.outcome_network)
            experience = self.store.experience.rows(self.store.sample(t.outcome_batch, self.sampler).to(self.device))
            temper = transition.settings.temper(number)
            self._descend("outcomes", transition.outcome_loss(experience, self.system.engine.actions, temper), clip=20)

    def learn_context(self, experience: Experience) -> Tensor:
        """One update of context engine, prior and consequences; the beliefs (B, T + 1, A + 1, H) on the way."""
        with self.timed("context"):
            losses, beliefs = self.system.engine.loss(experience, self.system.transition, self.generator)
            self._descend("context", losses, clip=20)
            self.metrics["effect_entropy"] = entropy(experience.posterior.float()).mean()
        return beliefs

    def learn_value(self, experience: Experience, beliefs: Tensor) -> None:
        """One update of the value, and a step of the slow value towards it."""
        system = self.system
        with self.timed("value"):
            context = system.engine.context(beliefs).detach()
            self._descend("value", system.planner.loss(system.value, experience, context), clip=10)
            with torch.no_grad():
                for slow, fast in zip(system.slow_value.parameters(), system.value.parameters()):
                    slow.lerp_(fast, self.settings.planner.slow)

    def _descend(self, name: str, losses: dict[str, Tensor], clip: float) -> None:
        optimiser = self.optimisers[name]
        optimiser.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        learnt = [p for group in optimiser.param_groups for p in group["params"]]
        self.processes.average([p.grad for p in learnt if p.grad is not None])
        nn.utils.clip_grad_norm_(learnt, clip)
        optimiser.step()
        self.metrics |= {f"{name}/{key}": loss.detach() for key, loss in losses.items()}

    def set_rates(self, phase: str, update: int) -> None:
        """Learning rates of an update."""
        s, late = self.settings, phase == "adaptation"
        done = update / s.training.updates if late else 0
        share = 1 - (1 - s.training.final_rate) * min(1.0, done)
        first = (s.vae.encoder_rate, s.vae.decoder_rate, s.context.learning_rate)
        early = 1 - (1 - s.vae.final_rate) * min(1.0, self.update / s.training.perception_updates)
        rates = {
            "vae": [s.vae.late_rate] * 3 if late else [early * rate for rate in first],
            "outcomes": [s.transition.learning_rate * share],
            "context": [s.context.learning_rate * share],
            "value": [s.planner.learning_rate * share],
        }
        for name, optimiser in self.optimisers.items():
            for group, rate in zip(optimiser.param_groups, rates[name]):
                group["lr"] = rate

    def settle(self) -> None:
        """Let the metrics be their mean over all processes."""
        if self.processes.count > 1:
            means = torch.stack([value.detach().float().cpu() for _, value in sorted(self.metrics.items())])
            self.processes.average([means])
            self.metrics = dict(zip(sorted(self.metrics), means))

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time inside to `seconds[part]`."""
        start = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

    def state_dict(self) -> dict:
        """Everything that decides the future of the run, but the pictures of the stores; to be called by all processes.

        Raises:
            RuntimeError: the processes' weights differ.
        """
        modules = {name: module.state_dict() for name, module in self.system.modules().items()}
        if self.processes.count > 1:
            flat = torch.cat([x.detach().flatten().cpu().double() for state in modules.values() for x in state.values()])
            if len(set(self.processes.every(hashlib.sha256(flat.numpy().tobytes()).hexdigest()))) > 1:
                raise RuntimeError(f"the processes' weights differ at update {self.update}: this is a defect, please report it.")
        own = {"generators": [self.generator.get_state(), self.sampler.get_state()], "store": self.store.state_dict()}
        return {
            "modules": modules,
            "optimisers": {name: optimiser.state_dict() for name, optimiser in self.optimisers.items()},
            "counters": [self.update, self.collections, self.env_steps],
            "metrics": {name: float(value) for name, value in self.metrics.items()},
            "seconds": dict(self.seconds),
            "shards": self.processes.every(own),
        }

    def load_state_dict(self, state: dict, blocks: Path) -> None:
        """Restore from `state_dict` and the folder of the stores' blocks; UserError if another number of processes made it."""
        shards, rank = state["shards"], self.processes.rank
        if len(shards) != self.processes.count:
            raise UserError(f"the run was trained by {len(shards)} processes, not {self.processes.count}: resume it with as many.")
        self.system.load(state["modules"])
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(state["optimisers"][name])
        for generator, saved in zip((self.generator, self.sampler), shards[rank]["generators"]):
            generator.set_state(saved.cpu())
        self.update, self.collections, self.env_steps = state["counters"]
        self.metrics = {name: torch.tensor(value) for name, value in state["metrics"].items()}
        self.seconds = dict(state["seconds"])
        if self.processes.first:
            forget_blocks(blocks, [shard["store"] for shard in shards])
        self.store.load_state_dict(shards[rank]["store"], blocks)


def rewards_of(world: WorldSettings, lifetimes: int = 16, most: int = 4) -> tuple[float, ...]:
    """Reward bins: 0 and what the things are worth.

    For a Gymnasium world, of which nothing is known, from random lifetimes: 0, and on either side the rewards seen if these are
    at most so many, else as many evenly spaced ones up to the largest seen. They reach at least to 1, because whoever learns
    earns more than whoever does not; what lies beyond them counts as the outermost. -1, 0, 1 if nothing was earned at all.
    """
    if not world.gym_id:
        return tuple(sorted({0.0, *map(float, world.worths)}))
    worlds = make_worlds(world, lifetimes, "train", seed=0)
    seen = play(worlds, RandomAgent(0, world.sizes.actions)).reward
    if not seen.any():
        return TransitionSettings().reward_bins
    bins = {0.0, max(1.0, float(seen.max()))}
    for kinds in (seen[seen > 0].unique().tolist(), seen[seen < 0].unique().tolist()):
        if len(kinds) > most:
            largest = math.copysign(max(1.0, *map(abs, kinds)), kinds[0])
            kinds = [largest * k / most for k in range(1, most + 1)]
        bins |= set(kinds)
    return tuple(sorted({float(str(np.float32(x))) for x in bins}))  # the shortest decimals that are these numbers
