"""Agents: the controller that infers, plans and acts, reference agents on the exact filter; how lifetimes compare.

Every agent answers `begin(frames)`, `act() -> actions` and `observe(actions, step)`; `rollout` drives any of them.
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
from environment import ExternalWorlds, HiddenRulesWorld, WorldSettings, make_worlds
from memory import (
    EpisodicMemory, Experience, LifetimeStore, Processes, RunFolder, UserError, WorldStep, remove_stale_blocks, require, require_all, make_generator, as_tensor,
)  # fmt: skip
from transition_model import EffectCache, TransitionModel, TransitionSettings, Value, entropy, merge_equal, contact_pairs
from world_model import VAE


@dataclass(frozen=True)
class PlannerSettings:
    """Planning and the value."""

    discount: float = 0.95
    """Of rewards, for each step, in (0, 1)."""
    top_p: float = 0.85
    """Probability, in (0, 1], of the imagined num_effects that are followed; the least min_branch_prob are left out."""
    expand_margin: float = 0.2
    """Actions whose value comes within this of the best one's are looked at a second step ahead; 0 for none."""
    min_branch_prob: float = 0.3
    """And there only steps whose probability that the episode goes on behind them is above this, in [0, .999]."""
    keypoints: int = 8
    """Points that the value finds in the grid, at least 1."""
    width: int = 192
    """Hidden features of the value, at least 1."""
    lambda_: float = 0.8
    """Lambda of the returns that the value learns from, in [0, 1]."""
    tau: float = 0.2
    """Share of the way that the slow value goes towards the learnt one at each update, in (0, 1]."""
    learning_rate: float = 4e-3
    """Adam's, of the value; it decays with the run."""

    def __post_init__(self) -> None:
        require_all(
            "planner", self, discount=(1e-3, 0.9999), top_p=(1e-6, 1), expand_margin=(0, 1e6), min_branch_prob=(0, 0.999),
            keypoints=(1, 1024), width=(1, 4096), lambda_=(0, 1), tau=(1e-6, 1), learning_rate=(0, 1),
        )  # fmt: skip


class Expansion(NamedTuple):
    """What may happen next in B states: P min_branch_prob effects in all, each shared by the actions that may have it."""

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
    V(z', c), and behind min_branch_prob effects of actions whose value is close to the best one's max_a' Q(z', a'), with V below it.
    The belief does not change inside the plan: what information is worth enters through V and W alone, which were learnt over
    beliefs. Source: Russell and Wefald, 1991 (search where it may change the decision).
    """

    CHUNK = 256  # bounds memory while the belief is still vague and many effects are min_branch_prob

    def __init__(self, settings: PlannerSettings, transition: TransitionModel, value: Value) -> None:
        self.settings, self.transition, self.value = settings, transition, value

    @torch.inference_mode()  # a decision for one world takes an eighth less than with no_grad: less to note down
    def action_values(self, codes: Tensor, context: Tensor, depth: int = 2, predict: Callable | None = None) -> Tensor:
        """Q (B, A) of code grids (B, S) uint8 under contexts (B, A + 1, D).

        Args:
            depth: 1 or 2 steps.
            predict: a `EffectCache`, for as long as the num_effects do not learn.
        """
        predict = predict or self.transition.effects.predict
        parts = zip(codes.split(self.CHUNK), context.split(self.CHUNK))
        return torch.cat([self._search(*part, depth, predict) for part in parts])

    def _search(self, codes: Tensor, context: Tensor, depth: int, predict: Callable) -> Tensor:
        expansion = self._expand(codes, context, predict)
        q = self._back_up(expansion, expansion.next_value)
        if depth == 1:
            return q
        # Expand a second step where it may change the choice: behind min_branch_prob effects of the actions close to the best.
        candidate = q > q.amax(1, keepdim=True) - self.settings.expand_margin
        candidate &= (candidate.sum(1) > 1)[:, None]  # one candidate: nothing to choose
        going_on = expansion.probability[expansion.state, :, expansion.effect] * (1 - expansion.end)[:, None]  # (P, A)
        deeper = (candidate[expansion.state] & (going_on > self.settings.min_branch_prob)).any(1).nonzero()[:, 0]
        if len(deeper) == 0:
            return q
        below = self.action_values(expansion.next_codes[deeper], context[expansion.state[deeper]], depth - 1, predict)
        next_value = expansion.next_value.index_copy(0, deeper, below.amax(1))
        return self._back_up(expansion, next_value)

    def loss(self, value: Value, experience: Experience, context: Tensor) -> dict[str, Tensor]:
        """Learn what states and reset_value episodes are worth, from stored lifetimes and the planner's own look-ahead.

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
            scalars by name: value and reset_value, mean squared errors in squared units of reward.
        """
        B, T = experience.action.shape
        slow = self.value
        codes, ended = experience.codes.flatten(0, 1), experience.ended
        best, choice = self.action_values(codes, context[:, :-1].flatten(0, 1), depth=1).view(B, T, -1).max(-1)
        with torch.no_grad():
            pooled = slow.pool(context[:, 1:].flatten(0, 1))
            next_value = slow(slow.statistics(experience.next_codes.flatten(0, 1)), pooled).view(B, T)
            after = torch.where(ended, slow.reset_value(pooled).view(B, T), next_value)
        target, following = torch.zeros_like(best), after[:, -1]
        for t in reversed(range(T)):
            boot = self.settings.lambda_ * following + (1 - self.settings.lambda_) * after[:, t]
            taken = 0.5 * (experience.reward[:, t] + self.settings.discount * boot) + 0.5 * best[:, t]
            following = torch.where(experience.action[:, t] == choice[:, t], taken, best[:, t])
            target[:, t] = following
        first = torch.ones_like(ended)
        first[:, 1:] = ended[:, :-1]
        pooled = value.pool(context[:, :-1].flatten(0, 1))
        predicted = value(value.statistics(codes), pooled).view(B, T)
        return {
            "value": F.mse_loss(predicted, target),
            "reset_value": F.mse_loss(value.reset_value(pooled[first.flatten()]), target[first]),
        }

    def _expand(self, codes: Tensor, context: Tensor, predict: Callable) -> Expansion:
        """The min_branch_prob effects in states (B, S) under contexts (B, A + 1, D)."""
        transition, value = self.transition, self.value
        grids, first = predict(codes)  # (B, K, S), (B, K)
        prior = merge_equal(transition.log_prior(context[:, :-1]).exp(), first)  # num_effects that look alike from here are one
        kept, probability = top_p_filter(prior, self.settings.top_p)  # (B, A, K)
        state, effect = kept.any(1).nonzero(as_tuple=True)  # (P,)
        next_codes = grids[state, effect]
        present = contact_pairs(codes[state], next_codes, transition.codes)
        log_reward, end = transition.reward_and_termination(present, context[:, -1], state)
        pooled = value.pool(context)
        return Expansion(
            probability=probability, state=state, effect=effect, next_codes=next_codes,
            reward=log_reward.exp() @ transition.reward_bins, end=torch.sigmoid(end),
            reset_value=value.reset_value(pooled)[state], next_value=value(value.statistics(next_codes), pooled, state),
        )  # fmt: skip

    def _back_up(self, expansion: Expansion, next_value: Tensor) -> Tensor:
        """Q (B, A) from what going on is worth after each effect, next_value (P,)."""
        following = torch.lerp(next_value, expansion.reset_value, expansion.end)
        q_effect = expansion.probability.new_zeros(expansion.probability[:, 0].shape)  # (B, K)
        q_effect[expansion.state, expansion.effect] = expansion.reward + self.settings.discount * following
        return (expansion.probability * q_effect[:, None]).sum(-1)


def top_p_filter(probability: Tensor, mass: float) -> tuple[Tensor, Tensor]:
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
        planner: answers `action_values(codes, context, depth, predict)`.
        lifetime: steps of a lifetime.
        appearance: infers how everything looks, and its context modulates the VAE; without it the world's row does.
        keep_frames: keep the pictures in `memory`, for the store of past lifetimes.
        search_depth: 1 or 2 steps.
    """

    def __init__(
        self, vae: VAE, transition: TransitionModel, engine: ContextInferenceEngine, planner: Planner, lifetime: int,
        appearance: AppearanceEngine | None = None, keep_frames: bool = False, search_depth: int = 2,
    ) -> None:  # fmt: skip
        self.vae, self.transition, self.engine, self.planner = vae, transition, engine, planner
        self.lifetime, self.keep_frames = lifetime, keep_frames
        self.appearance, self.search_depth = appearance, search_depth
        self.exploration, self.generator = 0.0, None

    def explore(self, exploration: float, generator: torch.Generator) -> None:
        """From now on act at random with probability `exploration` in [0, 1], drawn from `generator`."""
        self.exploration, self.generator = exploration, generator

    def reset(self, frames: Tensor | np.ndarray) -> None:
        """A lifetime begins: the memory is cleared, because what happened under another rule says nothing here. One
        picture (H, W, 3) is a batch of one."""
        frames = as_tensor(frames) if isinstance(frames, np.ndarray) else frames
        frames = frames.to(next(self.vae.parameters()).device)
        frames = frames[None] if frames.ndim == 3 else frames
        patches = self.vae.grid[0] * self.vae.grid[1]
        self.memory = EpisodicMemory(
            len(frames), self.lifetime, patches, self.transition.settings.num_effects, frames.device, self.keep_frames
        )
        self.obs, self.belief, self.look = frames, self.engine.initial_belief(len(frames)), None
        self.effect_cache = EffectCache(self.transition.effects)
        self.nll: list[Tensor] = []  # for each step, how unexpected it was (B,), as in ExactFilter

    @torch.no_grad()
    def act(self) -> Tensor:
        """Choose actions (B,) int64: greedy on the planner's values, or random where exploring."""
        self.visual_context = self._visual_context()  # the pair around this action is seen under one context
        self.codes = self.vae.encode(self.obs, self.visual_context)
        if self.exploration >= 1:  # no need to plan
            return self._random()
        depth, context = self.search_depth, self.engine.context(self.belief)
        action = self.planner.action_values(self.codes, context, depth, self.effect_cache).argmax(-1)
        if self.exploration > 0:
            chance = torch.rand(len(action), generator=self.generator, device=action.device)
            action = torch.where(chance < self.exploration, self._random(), action)
        return action

    @torch.no_grad()
    def observe(self, action: Tensor, step: WorldStep) -> None:
        """Name what happened, remember it, and update the belief."""
        action, step = action.to(self.obs.device), WorldStep(*(part.to(self.obs.device) for part in step))
        next_codes = self.vae.encode(step.next_obs, self.visual_context)
        likelihood = self.transition.effects.log_likelihood(self.codes, next_codes)
        posterior = self.transition.effect_posterior(likelihood)
        self.nll.append(self.transition.nll(likelihood, action, self.engine.context(self.belief)))
        self.memory.append(self.codes, next_codes, posterior, action, self.obs, step)
        self.belief = self.engine.step(self.belief, self.memory.latest())
        self.obs = step.obs

    def _visual_context(self) -> Tensor:
        """The context (B, D) to see with."""
        if self.appearance is None:
            return self.engine.context(self.belief)[:, -1]
        contexts, self.look = self.appearance.sequence(self.vae.patches(self.obs)[:, None], self.look)
        return contexts[:, 0]

    def _random(self) -> Tensor:
        shape, device = (len(self.obs),), self.obs.device
        return torch.randint(self.engine.actions, shape, generator=self.generator, device=device)


class Agent(Protocol):
    """What `rollout` asks of an agent of B worlds."""

    def reset(self, frames: Tensor) -> None:
        """A lifetime begins with pictures (B, H, W, 3) uint8: remove_stale the last one."""

    def act(self) -> Tensor:
        """Choose actions (B,) int64 on what was seen last."""

    def observe(self, action: Tensor, step: WorldStep) -> None:
        """Learn what actions (B,) led to."""


class RandomAgent:
    """Acts at random, by a seed, with `actions` to choose from: the bottom of the scale."""

    def __init__(self, seed: int, actions: int = 4) -> None:
        self.seed, self.actions = seed, actions

    def reset(self, frames: Tensor) -> None:
        """Begin with the same luck in every lifetime."""
        self.batch, self.device = len(frames), frames.device
        self.generator = make_generator(self.seed, stream=2, device=self.device)

    def act(self) -> Tensor:
        """Actions (B,) int64, all equally min_branch_prob."""
        return torch.randint(self.actions, (self.batch,), generator=self.generator, device=self.device)

    def observe(self, action: Tensor, step: WorldStep) -> None:
        """Learn nothing."""


class Trajectories(NamedTuple):
    """What happened in B lifetimes of T steps, on the CPU."""

    reward: Tensor
    """(B, T) float32."""
    terminated: Tensor
    """(B, T) bool."""
    truncated: Tensor
    """(B, T) bool."""
    segment: Tensor
    """(B, T) int64: number of the rule that the step was lived under."""


def rollout(world: HiddenRulesWorld | ExternalWorlds, agent: Any, observers: Sequence[Any] = ()) -> Trajectories:
    """Let `agent` (see agent.Agent) live one lifetime in every world; observers `begin` and `observe` along."""
    frames = world.reset()
    for listener in (agent, *observers):
        listener.reset(frames)
    happened = []
    for _ in range(world.settings.lifetime):
        action = agent.act()
        step = world.step(action)
        for listener in (agent, *observers):
            listener.observe(action, step)
        happened.append((step.reward, step.terminated, step.truncated, world.step_segment))
    return Trajectories(*(torch.stack(part, 1).cpu() for part in zip(*happened)))


@dataclass(frozen=True)
class TrainingSettings:
    """The order and amount of meta-training. Perception and num_effects come first, then `updates` of the rest."""

    updates: int = 1000
    """Updates of context engine and value, at least 1: the length of the run."""
    envs: int = 64
    """Trajectories collected at once, at least 1."""
    random_lifetimes: int = 512
    """Trajectories lived at random before anything is learnt; a multiple of `worlds`."""
    perception_updates: int = 150
    """Updates of the VAE alone, first."""
    effect_updates: int = 600
    """Updates of the num_effects alone, second."""
    batch: int = 48
    """Stored lifetimes in an update of the context engine, at least 1."""
    value_batch: int = 16
    """Of these, lifetimes in an update of the value, at least 1 and at most `batch`."""
    effect_batch: int = 8
    """Stored lifetimes in an update of the num_effects, at least 1."""
    frame_batch: int = 256
    """Stored pictures in an update of the VAE, at least 1."""
    value_from: int = 100
    """First update at which the value learns."""
    plan_from: int = 200
    """First update at which lifetimes are collected with the planner; before it random ones, a quarter as often."""
    collect_every: int = 16
    """Updates between collections of new lifetimes, at least 1."""
    effect_every: int = 4
    """Updates between updates of the num_effects, at least 1."""
    perception_every: int = 8
    """Updates between updates of the VAE, at least 1."""
    exploration: float = 0.3
    """Share of random actions when planning begins, in [0, 1]; it falls evenly to `exploration_end`."""
    exploration_end: float = 0.03
    """Share of random actions at the end of the run, in [0, 1]."""
    final_lr_scale: float = 0.1
    """Learning rates fall evenly to this share of their beginning, in [0, 1]."""
    evaluation_lifetimes: int = 4096
    """Held-out lifetimes that every agent lives in the final evaluation, at least 2."""
    log_every: int = 20
    """Updates between lines of metrics.jsonl, at least 1."""
    checkpoint_every: int = 200
    """Updates between checkpoints, at least 1."""

    def share(self, processes: int) -> TrainingSettings:
        """What each of several processes does of it; UserError unless they can do equally much."""
        whole = {name: getattr(self, name) for name in ("envs", "batch", "value_batch", "effect_batch", "frame_batch")}
        for name, number in whole.items():
            if number % processes:
                near = math.ceil(number / processes) * processes
                raise UserError(f"training.{name} is {number}, which {processes} processes cannot share equally: choose {near}.")
        parts = {name: number // processes for name, number in whole.items()}
        return dataclasses.replace(self, random_lifetimes=self.random_lifetimes // processes, **parts)

    def __post_init__(self) -> None:
        least_one = (
            "updates", "envs", "random_lifetimes", "perception_updates", "effect_updates", "batch", "value_batch",
            "effect_batch", "frame_batch", "collect_every", "effect_every", "perception_every", "log_every", "checkpoint_every",
        )  # fmt: skip
        require_all(
            "training", self, **dict.fromkeys(least_one, (1, 10**9)), value_from=(0, 10**9), plan_from=(0, 10**9),
            exploration=(0, 1), exploration_end=(0, 1), final_lr_scale=(0, 1), evaluation_lifetimes=(2, 10**7),
        )  # fmt: skip
        require("training.value_batch", self.value_batch, 1, self.batch)
        if self.random_lifetimes % self.envs:
            raise ValueError(
                f"training.random_lifetimes is {self.random_lifetimes}, but must be a multiple of training.envs: "
                f"choose {math.ceil(self.random_lifetimes / self.envs) * self.envs}."
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
    target_value: Value
    planner: Planner

    def controller(self, kind: type = AgentController, **options: bool) -> AgentController:
        """An agent of these parts, of `AgentController` or a class of one's own; options are its constructor's."""
        parts = (self.vae, self.transition, self.engine, self.planner)
        return kind(*parts, lifetime=self.settings.world.lifetime, appearance=self.appearance, **options)

    def modules(self) -> dict[str, nn.Module]:
        """The parts with weights, by name."""
        names = ("vae", "transition", "engine", "appearance", "value", "target_value")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def load(self, states: dict[str, dict]) -> None:
        """Take over the weights of all parts, from their `state_dict`s by name."""
        for name, module in self.modules().items():
            module.load_state_dict(states[name])


class Learner:
    """What meta-training does, step by step; everything that decides its future is in `state_dict`. The loop is `main.train`.

    Gradients do not cross: the VAE learns from pictures, the num_effects from codes, the context engine with prior and
    reward_and_termination from cached effect posteriors, the value from the planner's look-ahead. Several processes may each have one and learn together.
    """

    def __init__(self, system: System, processes: Processes | None = None) -> None:
        settings, device = system.settings, system.device
        self.processes = processes or Processes()
        self.training = settings.training.share(self.processes.count)
        self.settings, self.device, self.system = settings, device, system
        self.store = LifetimeStore(settings.memory, device, self.processes.rank, self.processes.count)
        self.generator = make_generator(settings.seed, 4 + 100 * self.processes.rank, device)
        self.sampler = make_generator(settings.seed, 5 + 100 * self.processes.rank)  # of stored lifetimes, on the CPU
        encoder = [p for name, p in self.system.vae.named_parameters() if name.startswith("encoder")]
        decoder = [p for name, p in self.system.vae.named_parameters() if not name.startswith("encoder")]
        transition, engine = self.system.transition, self.system.engine
        look = [{"params": self.system.appearance.parameters()}] if self.system.appearance else []
        groups = {
            "vae": [{"params": encoder}, {"params": decoder}, *look],
            "effects": transition.effects.parameters(),
            "context": [*engine.parameters(), *transition.contextual_parameters()],
            "value": self.system.value.parameters(),
        }
        self.optimizers = {name: torch.optim.Adam(parameters, fused=True) for name, parameters in groups.items()}
        self.update = self.collections = self.env_steps = 0
        self.metrics: dict[str, Tensor] = {}
        self.seconds: dict[str, float] = {}

    @property
    def total(self) -> int:
        """Updates of all phases."""
        t = self.training
        return t.perception_updates + t.effect_updates + t.updates

    def phase(self) -> tuple[str, int]:
        """The name of the present phase, and the number of the present update in it."""
        t = self.training
        left = self.update
        for name, updates in (("perception", t.perception_updates), ("effects", t.effect_updates)):
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

    def warm_start(self, run: RunFolder) -> None:
        """Begin where perception and num_effects are learnt, with the weights of `run`; UserError if sizes differ."""
        try:
            self.system.load(run.load()[0]["modules"])
        except (RuntimeError, KeyError) as error:
            raise UserError(f"{run.folder} has parts of other sizes: give the settings that it was trained with.") from error
        self.collect_random_lifetimes()
        self.update = self.training.perception_updates + self.training.effect_updates

    def collect_random_lifetimes(self) -> None:
        """Live the random lifetimes that everything begins with."""
        while self.collections < self.training.random_lifetimes // self.training.envs:
            self.collect(exploration=1.0)

    def collect(self, exploration: float) -> None:
        """Live new lifetimes in training tasks, with `exploration` of the actions at random, and store them."""
        s = self.settings
        # Another world for every collection of every process of every run.
        seed = (s.seed + 1) * 2**32 + self.processes.rank * 2**22 + self.collections
        with self.timed("collect"):
            world = make_worlds(s.world, self.training.envs, "train", seed, self.device)
            agent = self.system.controller(keep_frames=True, search_depth=1)  # cheaper, and teaches as well
            agent.explore(exploration, self.generator)
            lifetimes = rollout(world, agent)
            self.store.add(agent.memory, world.task, lifetimes.segment, self.update)
        self.collections += 1
        self.env_steps += lifetimes.reward.numel() * self.processes.count
        self.metrics["return"] = lifetimes.reward.sum(1).mean()
        bins = s.transition.reward_bins
        if lifetimes.reward.min() < bins[0] or lifetimes.reward.max() > bins[-1]:
            ends = f"{bins[0]:g} to {bins[-1]:g}"
            warnings.warn(f"some rewards lie beyond transition.reward_bins, {ends}, and count as those: widen them.")

    def reencode_all(self) -> None:
        """`reencode` every block of the store."""
        for index in range(len(self.store.blocks)):
            self.reencode(index)

    @torch.no_grad()
    def reencode(self, index: int, rows_at_once: int = 8) -> None:
        """Let the present models see a block of the store again: its codes and effect posteriors."""
        system, block = self.system, self.store.blocks[index]
        with self.timed("reencode"):
            experience = self.store.experience.rows(self.store.rows_of(index))
            if system.appearance:
                visual_context = torch.cat([self.appearances(frames.to(self.device)) for frames in block.frames.split(rows_at_once)])
            else:
                visual_context = system.engine.context(system.engine.sequence(experience)[:, :-1])[:, :, -1]  # (n, T, D)
            made = []
            for frames, next_obs, seen in zip(*(x.split(rows_at_once) for x in (block.frames, block.next_obs(), visual_context))):
                before, after = (
                    system.vae.encode(pictures.flatten(0, 1).to(self.device), seen.flatten(0, 1)) for pictures in (frames, next_obs)
                )
                likelihood = system.transition.effects.log_likelihood(before, after)
                made.append((before, after, system.transition.effect_posterior(likelihood)))
            shape = experience.action.shape
            self.store.reencode(index, *(torch.cat(parts).view(*shape, -1) for parts in zip(*made)), self.update)

    def appearances(self, frames: Tensor) -> Tensor:
        """Contexts (n, T, D) to see whole lifetimes of pictures (n, T, H, W, 3) with."""
        patches = self.system.vae.patches(frames.flatten(0, 1))
        return self.system.appearance.sequence(patches.view(*frames.shape[:2], *patches.shape[1:]))[0]

    def learn_perception(self, rows: Tensor, beliefs: Tensor | None = None) -> None:
        """One update of the VAE on pictures of lifetimes `rows`; without beliefs (B, T + 1, A + 1, H) under no context.

        Where the appearance is inferred, that learns along, from whole lifetimes of which sixteen pictures each are used.
        """
        size, system, lifetime = self.training.frame_batch, self.system, self.settings.world.lifetime
        with self.timed("vae"):
            which = torch.randint(len(rows), (size,), generator=self.sampler)
            step = torch.randint(lifetime, (size,), generator=self.sampler)
            if system.appearance:
                few, which = which[: -(-size // 16)], torch.arange(size) // 16
                every = torch.arange(lifetime).repeat(len(few))
                frames = self.store.frames_at(rows[few].repeat_interleave(lifetime), every).to(self.device)
                frames = frames.unflatten(0, (len(few), lifetime))
                frames, visual_context = frames[which, step], self.appearances(frames)[which, step]
            else:
                frames = self.store.frames_at(rows[which], step).to(self.device)
                visual_context = torch.zeros(size, self.settings.context.context, device=self.device)
                if beliefs is not None:
                    visual_context = system.engine.context(beliefs[which, step])[:, -1].detach()
            if self.update == 0:
                system.vae.init_codes_kmeans(self.processes.all_gather(frames), self.processes.all_gather(visual_context))
                self.processes.broadcast(system.vae)
            self.optimizer_step("vae", system.vae.loss(frames, visual_context), clip=1e4)

    def merge_codes(self, every: int = 16) -> None:
        """Perception is new: let its codes that stand for the same count as one, by every so many pictures of a block."""
        frames = self.store.blocks[0].frames.to(self.device)
        visual_context = torch.zeros(*frames.shape[:2], self.settings.context.context, device=self.device)
        if self.system.appearance:
            with torch.no_grad():
                visual_context = self.appearances(frames)
        seen = (self.processes.all_gather(x[:, ::every].flatten(0, 1)) for x in (frames, visual_context))
        self.system.vae.merge_codes(*seen)
        self.processes.broadcast(self.system.vae)

    def learn_effects(self, number: int) -> None:
        """Outcome update `number`: its phase follows from it."""
        t, transition = self.training, self.system.transition
        with self.timed("effects"):
            if transition.settings.splits_at(number):
                sample = self.store.experience.rows(self.store.sample(4 * t.effect_batch, self.sampler))
                codes, next_codes = (self.processes.all_gather(x.flatten(0, 1)) for x in (sample.codes, sample.next_codes))
                transition.effects.split(codes, next_codes, self.generator)
                self.processes.broadcast(transition.effects)
            experience = self.store.experience.rows(self.store.sample(t.effect_batch, self.sampler).to(self.device))
            likelihood_exponent = transition.settings.likelihood_exponent(number)
            self.optimizer_step("effects", transition.effect_loss(experience, self.system.engine.actions, likelihood_exponent), clip=20)

    def learn_context(self, experience: Experience) -> Tensor:
        """One update of context engine, prior and reward_and_termination; the beliefs (B, T + 1, A + 1, H) on the way."""
        with self.timed("context"):
            losses, beliefs = self.system.engine.loss(experience, self.system.transition, self.generator)
            self.optimizer_step("context", losses, clip=20)
            self.metrics["effect_entropy"] = entropy(experience.posterior.float()).mean()
        return beliefs

    def learn_value(self, experience: Experience, beliefs: Tensor) -> None:
        """One update of the value, and a step of the slow value towards it."""
        system = self.system
        with self.timed("value"):
            context = system.engine.context(beliefs).detach()
            self.optimizer_step("value", system.planner.loss(system.value, experience, context), clip=10)
            with torch.no_grad():
                for slow, fast in zip(system.target_value.parameters(), system.value.parameters()):
                    slow.lerp_(fast, self.settings.planner.tau)

    def optimizer_step(self, name: str, losses: dict[str, Tensor], clip: float) -> None:
        optimizer = self.optimizers[name]
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        learnt = [p for group in optimizer.param_groups for p in group["params"]]
        self.processes.average([p.grad for p in learnt if p.grad is not None])
        nn.utils.clip_grad_norm_(learnt, clip)
        optimizer.step()
        self.metrics |= {f"{name}/{key}": loss.detach() for key, loss in losses.items()}

    def set_learning_rates(self, phase: str, update: int) -> None:
        """Learning rates of an update."""
        s, late = self.settings, phase == "adaptation"
        done = update / s.training.updates if late else 0
        share = 1 - (1 - s.training.final_lr_scale) * min(1.0, done)
        first = (s.vae.encoder_lr, s.vae.decoder_lr, s.context.learning_rate)
        early = 1 - (1 - s.vae.final_lr_scale) * min(1.0, self.update / s.training.perception_updates)
        rates = {
            "vae": [s.vae.late_lr] * 3 if late else [early * rate for rate in first],
            "effects": [s.transition.learning_rate * share],
            "context": [s.context.learning_rate * share],
            "value": [s.planner.learning_rate * share],
        }
        for name, optimizer in self.optimizers.items():
            for group, rate in zip(optimizer.param_groups, rates[name]):
                group["lr"] = rate

    def average_metrics(self) -> None:
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
            if len(set(self.processes.all_gather_object(hashlib.sha256(flat.numpy().tobytes()).hexdigest()))) > 1:
                raise RuntimeError(f"the processes' weights differ at update {self.update}: this is a defect, please report it.")
        own = {"generators": [self.generator.get_state(), self.sampler.get_state()], "store": self.store.state_dict()}
        return {
            "modules": modules,
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "counters": [self.update, self.collections, self.env_steps],
            "metrics": {name: float(value) for name, value in self.metrics.items()},
            "seconds": dict(self.seconds),
            "shards": self.processes.all_gather_object(own),
        }

    def load_state_dict(self, state: dict, blocks: Path) -> None:
        """Restore from `state_dict` and the folder of the stores' blocks; UserError if another number of processes made it."""
        shards, rank = state["shards"], self.processes.rank
        if len(shards) != self.processes.count:
            raise UserError(f"the run was trained by {len(shards)} processes, not {self.processes.count}: resume it with as many.")
        self.system.load(state["modules"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        for generator, saved in zip((self.generator, self.sampler), shards[rank]["generators"]):
            generator.set_state(saved.cpu())
        self.update, self.collections, self.env_steps = state["counters"]
        self.metrics = {name: torch.tensor(value) for name, value in state["metrics"].items()}
        self.seconds = dict(state["seconds"])
        if self.processes.is_main:
            remove_stale_blocks(blocks, [shard["store"] for shard in shards])
        self.store.load_state_dict(shards[rank]["store"], blocks)


def infer_reward_bins(world: WorldSettings, lifetimes: int = 16, most: int = 4) -> tuple[float, ...]:
    """Reward bins: 0 and what the things are worth.

    For a Gymnasium world, of which nothing is known, from random lifetimes: 0, and on either side the rewards seen if these are
    at most so many, else as many evenly spaced ones up to the largest seen. They reach at least to 1, because whoever learns
    earns more than whoever does not; what lies beyond them counts as the outermost. -1, 0, 1 if nothing was earned at all.
    """
    if not world.gym_id:
        return tuple(sorted({0.0, *map(float, world.reward_values)}))
    worlds = make_worlds(world, lifetimes, "train", seed=0)
    seen = rollout(worlds, RandomAgent(0, world.sizes.actions)).reward
    if not seen.any():
        return TransitionSettings().reward_bins
    bins = {0.0, max(1.0, float(seen.max()))}
    for kinds in (seen[seen > 0].unique().tolist(), seen[seen < 0].unique().tolist()):
        if len(kinds) > most:
            largest = math.copysign(max(1.0, *map(abs, kinds)), kinds[0])
            kinds = [largest * k / most for k in range(1, most + 1)]
        bins |= set(kinds)
    return tuple(sorted({float(str(np.float32(x))) for x in bins}))  # the shortest decimals that are these numbers
