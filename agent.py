"""Agents: the controller that infers, plans and acts, its learnt value, and the reference agents on the exact filter.

Every agent answers `begin(frames)`, `act() -> actions` and `observe(actions, step)`; `environment.play` drives any of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from context_engine import ContextInferenceEngine
from environment import (
    N_ACTIONS, N_TASKS, HiddenRulesWorld, Lifetimes, WorldSettings, WorldStep, log_likelihood, play, require,
    reward_consistent, rule_of, seeded, value_iteration,
)  # fmt: skip
from film_layer import FiLMLayer
from memory import EpisodicMemory, Experience
from transition_model import ABSENT, TransitionModel, one_hot, pairs_present
from world_model import VAE


@dataclass(frozen=True)
class PlannerSettings:
    """Planning and the value."""

    discount: float = 0.95
    """Of rewards, for each step, in (0, 1)."""
    mass: float = 0.85
    """Probability, in (0, 1], of the imagined outcomes and of the rewards that are followed; the least likely are left out."""
    keypoints: int = 8
    """Points that the value finds in the grid, at least 1."""
    width: int = 192
    """Hidden features of the value, at least 1."""
    trace: float = 0.8
    """Lambda of the returns that the value learns from, in [0, 1]."""
    slow: float = 0.1
    """Share of the way that the slow value goes towards the learnt one at each update, in (0, 1]."""
    learning_rate: float = 2e-3
    """Adam's, of the value; it decays with the run."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("discount", 1e-3, 0.9999), ("mass", 1e-6, 1), ("keypoints", 1, 1024), ("width", 1, 4096), ("trace", 0, 1),
            ("slow", 1e-6, 1), ("learning_rate", 0, 1),
        ):  # fmt: skip
            require(f"planner.{name}", getattr(self, name), low, high)


# ----------------------------------------------------------------------------------------------------------- the value


class Value(nn.Module):
    """What a state is worth under a belief, V(z, c), and what a fresh episode is worth, W(c).

    It reads the belief as well as the state, so a move that teaches is worth something. The state enters through
    keypoints, as in the spatial softmax of Finn et al. (2016), with one change: attention goes to the *codes* that are
    present, each standing at its centre, and not to single patches. So the background, one code on most patches, does
    not drown the few things that matter, and the value wakes earlier. The rows of the context enter through a mean over
    actions: a relabelling of the actions changes nothing.

    Args:
        settings: see `PlannerSettings`.
        codes: number of codes C.
        grid: (rows, columns) of patches.
        context_dim: size D of a row of the context.
    """

    POOLED = 64  # features of the pooled context, of the actions and of the world each

    def __init__(self, settings: PlannerSettings, codes: int, grid: tuple[int, int], context_dim: int) -> None:
        super().__init__()
        points, width, pooled = settings.keypoints, settings.width, 2 * self.POOLED
        self.codes = codes
        self.of_action = nn.Linear(context_dim, self.POOLED)
        self.of_world = nn.Linear(context_dim, self.POOLED)
        self.code_features = nn.Parameter(torch.randn(1, codes, 32) * 0.5)
        self.code_film = FiLMLayer(pooled, 32)
        self.code_out = nn.Linear(32, 2 * points)
        self.state_in = nn.Linear(4 * points, width)
        self.state_norm = nn.LayerNorm(width)
        self.state_film = FiLMLayer(pooled, width)
        self.state_hidden = nn.Linear(width, width)
        self.state_out = nn.Linear(width, 1)
        self.fresh_out = nn.Sequential(nn.Linear(pooled, 128), nn.SiLU(), nn.Linear(128, 1))
        nn.init.zeros_(self.state_out.weight)
        nn.init.zeros_(self.fresh_out[-1].weight)
        axes = [torch.linspace(-1, 1, n) for n in grid]
        place = torch.stack([torch.ones(grid), *torch.meshgrid(*axes, indexing="ij")], -1).view(-1, 3)
        self.register_buffer("place", place, persistent=False)  # (S, (one, y, x))

    def statistics(self, codes: Tensor) -> Tensor:
        """Share of the patches, and centre y and x in -1..1, of every code: (B, C, 3) float, of grids (B, S) uint8."""
        sums = one_hot(codes, self.codes).transpose(1, 2) @ self.place
        return torch.cat([sums[..., :1] / len(self.place), sums[..., 1:] / sums[..., :1].clamp_min(1)], -1)

    def pool(self, context: Tensor) -> Tensor:
        """What the value reads of contexts (B, A + 1, D): (B, 128)."""
        actions = F.silu(self.of_action(context[:, :-1])).mean(1)
        return torch.cat([actions, F.silu(self.of_world(context[:, -1]))], -1)

    def forward(self, statistics: Tensor, pooled: Tensor) -> Tensor:
        """V (B,) of states by `statistics` (B, C, 3) under pooled contexts (B, 128)."""
        features = F.silu(self.code_film(self.code_features.expand(len(pooled), -1, -1), pooled))
        key, value = self.code_out(features).chunk(2, -1)  # (B, C, P) each
        count, centre = statistics[..., :1], statistics[..., 1:]
        masked = key.masked_fill(count == 0, ABSENT)
        weight = (4 * masked).softmax(1)
        points = torch.einsum("bcp,bcd->bpd", weight, centre)
        state = torch.cat([points.flatten(1), masked.amax(1), (weight * value).sum(1)], -1)
        state = F.silu(self.state_film(self.state_norm(self.state_in(state)), pooled))
        state = state + F.silu(self.state_hidden(state))
        return self.state_out(state)[:, 0]

    def fresh(self, pooled: Tensor) -> Tensor:
        """W (B,): the value of beginning an episode under pooled contexts (B, 128)."""
        return self.fresh_out(pooled)[:, 0]


# -------------------------------------------------------------------------------------------------------- the planner


class Planner:
    """One Bayes-adaptive step, then the learnt value.

        Q(z, h, a) = sum_k pi(k|a, c) sum_r p(r|z, z'_k, c) [ r + discount ((1 - e) V(z'_k, c'_kr) + e W(c'_kr)) ]

    z'_k is the outcome's mode, e the probability that the episode ends, and c'_kr the context after the imagined
    experience (a, k, r): the value of what an action teaches is part of the action's value. Source of the principle:
    Duff, "Optimal Learning", 2002 (Bayes-adaptive planning).
    """

    def __init__(self, settings: PlannerSettings, transition: TransitionModel, engine: ContextInferenceEngine, value: Value) -> None:
        self.settings, self.transition, self.engine, self.value = settings, transition, engine, value

    STATES_AT_ONCE = 256  # bounds memory while the belief is still vague and branches are many

    @torch.no_grad()
    def action_values(self, codes: Tensor, belief: Tensor) -> Tensor:
        """Q (B, A) of code grids (B, S) uint8 under beliefs (B, A + 1, H)."""
        parts = zip(codes.split(self.STATES_AT_ONCE), belief.split(self.STATES_AT_ONCE))
        return torch.cat([self._action_values(*part) for part in parts])

    def _action_values(self, codes: Tensor, belief: Tensor) -> Tensor:
        transition, engine, value, mass = self.transition, self.engine, self.value, self.settings.mass
        B, actions = len(codes), engine.actions
        context = engine.context(belief)

        # Imagine what can happen: outcomes that look alike from here are one, and take the mass of all.
        grids, alike = transition.outcome_network.modes(codes)  # (B, K, S), (B, K, K)
        kept, weight = branch(transition.log_prior(context[:, :-1]).exp() @ alike, mass)  # (B, A, K)
        state, outcome = kept.any(1).nonzero(as_tuple=True)  # P pairs, shared by the actions
        pair = torch.zeros(B, kept.shape[-1], dtype=torch.int64, device=codes.device)
        pair[state, outcome] = torch.arange(len(state), device=codes.device)
        next_codes = grids[state, outcome]
        present = pairs_present(codes[state], next_codes, transition.codes)
        log_reward, end = transition.consequences(present, transition.consequence_table(context[:, -1])[state])
        rewarded, reward_weight = branch(log_reward.exp(), mass)  # (P, bins)
        effect = transition.effect_of_alike(alike[state, :, outcome])  # (P, K)

        # Weigh every branch (state, action, outcome, reward): what will be known then, and what it is worth.
        row, action, outcome = kept.nonzero(as_tuple=True)
        weight, of = weight[row, action, outcome], pair[row, outcome]
        which, bin_ = rewarded[of].nonzero(as_tuple=True)
        row, action, of, weight = row[which], action[which], of[which], weight[which]
        reward = transition.reward_bins[bin_]
        after = engine.imagine(belief, row, action, effect[of], reward, present[of])
        pooled = value.pool(engine.context(after))
        onward = value(value.statistics(next_codes)[of], pooled)
        worth = reward + self.settings.discount * torch.lerp(onward, value.fresh(pooled), torch.sigmoid(end)[of])

        # Back up.
        q = torch.zeros(B * actions, device=codes.device)
        q.index_add_(0, row * actions + action, worth * weight * reward_weight[of, bin_])
        return q.view(B, actions)


def branch(probability: Tensor, mass: float) -> tuple[Tensor, Tensor]:
    """Which entries (bool) of probabilities (..., n) make up the smallest set of at least `mass`, and these
    renormalised to one."""
    ordered, index = probability.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = torch.zeros_like(probability, dtype=torch.bool).scatter_(-1, index, (before < mass) & (ordered > 0))
    weight = probability * kept
    return kept, weight / weight.sum(-1, keepdim=True)


def value_loss(
    value: Value, planner: Planner, experience: Experience, beliefs: Tensor
) -> dict[str, Tensor]:  # fmt: skip
    """Learn what states and fresh episodes are worth, from stored lifetimes and the planner's own look-ahead.

    Along each lifetime, backwards, with the slow value V-, W- (which `planner` holds) and e_t = the episode ended at t:

        boot_t = lambda g_t+1 + (1 - lambda) after_t,    after_t = W-(c_t+1) if e_t else V-(z'_t, c_t+1)
        g_t    = (r_t + discount boot_t + max_a Q_t) / 2  where the action taken was the planner's choice,
                 max_a Q_t                                where it was not
        loss   = mean (V(z_t, c_t) - g_t)^2 + mean over first steps of episodes (W(c_t) - g_t)^2

    Time limits end episodes but not the lifetime, so they too lead to W.

    Args:
        value: learns; planner: with the slow value.
        experience: (B, T, ...); beliefs: (B, T + 1, A + 1, H), without gradient.

    Returns:
        scalars by name: value and fresh, mean squared errors in squared units of reward.
    """
    B, T = experience.action.shape
    settings, slow, engine = planner.settings, planner.value, planner.engine
    codes, ended = experience.codes.flatten(0, 1), experience.terminated | experience.truncated
    with torch.no_grad():
        context = engine.context(beliefs)  # (B, T + 1, A + 1, D)
        best, choice = planner.action_values(codes, beliefs[:, :-1].flatten(0, 1)).view(B, T, -1).max(-1)
        pooled = slow.pool(context[:, 1:].flatten(0, 1))
        onward = slow(slow.statistics(experience.next_codes.flatten(0, 1)), pooled).view(B, T)
        after = torch.where(ended, slow.fresh(pooled).view(B, T), onward)
        target, following = torch.zeros(B, T, device=best.device), after[:, -1]
        for t in reversed(range(T)):
            boot = settings.trace * following + (1 - settings.trace) * after[:, t]
            taken = 0.5 * (experience.reward[:, t] + settings.discount * boot) + 0.5 * best[:, t]
            following = torch.where(experience.action[:, t] == choice[:, t], taken, best[:, t])
            target[:, t] = following
        first = torch.ones(B, T, dtype=torch.bool, device=best.device)
        first[:, 1:] = ended[:, :-1]
    pooled = value.pool(context[:, :-1].flatten(0, 1))
    predicted = value(value.statistics(codes), pooled).view(B, T)
    return {
        "value": F.mse_loss(predicted, target),
        "fresh": F.mse_loss(value.fresh(pooled[first.flatten()]), target[first]),
    }


# -------------------------------------------------------------------------------------------------------------- agents


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
        planner: answers `action_values(codes, belief)`.
        lifetime: steps of a lifetime.
        keep_pictures: keep the pictures in `memory`, for the store of past lifetimes.
        freeze_belief: never update the belief: the ablation that shows what adaptation is worth.
    """

    def __init__(
        self, vae: VAE, transition: TransitionModel, engine: ContextInferenceEngine, planner: Planner, lifetime: int,
        keep_pictures: bool = False, freeze_belief: bool = False,
    ) -> None:  # fmt: skip
        self.vae, self.transition, self.engine, self.planner = vae, transition, engine, planner
        self.lifetime, self.keep_pictures, self.freeze_belief = lifetime, keep_pictures, freeze_belief
        self.exploration, self.generator = 0.0, None

    def explore(self, exploration: float, generator: torch.Generator) -> None:
        """From now on act at random with probability `exploration` in [0, 1], drawn from `generator`."""
        self.exploration, self.generator = exploration, generator

    def begin(self, frames: Tensor) -> None:
        """A lifetime begins: the memory is cleared, because what happened under another rule says nothing here."""
        patches = self.vae.grid[0] * self.vae.grid[1]
        self.memory = EpisodicMemory(
            len(frames), self.lifetime, patches, self.transition.settings.outcomes, frames.device, self.keep_pictures
        )
        self.frame, self.belief = frames, self.engine.initial_belief(len(frames))
        self.nats: list[Tensor] = []  # for each step, how unexpected it was (B,), as in ExactFilter

    @torch.no_grad()
    def act(self) -> Tensor:
        """Choose actions (B,) int64: greedy on the planner's values, or random where exploring."""
        self.vision = self.engine.context(self.belief)[:, -1]  # the pair around this action is seen under one context
        self.codes = self.vae.encode(self.frame, self.vision)
        if self.exploration >= 1:  # no need to plan
            return self._random()
        action = self.planner.action_values(self.codes, self.belief).argmax(-1)
        if self.exploration > 0:
            chance = torch.rand(len(action), generator=self.generator, device=action.device)
            action = torch.where(chance < self.exploration, self._random(), action)
        return action

    @torch.no_grad()
    def observe(self, action: Tensor, step: WorldStep) -> None:
        """Name what happened, remember it, and update the belief."""
        next_codes = self.vae.encode(step.arrival, self.vision)
        likelihood = self.transition.outcome_network.log_likelihood(self.codes, next_codes)
        posterior = self.transition.effect_posterior(likelihood)
        self.nats.append(self.transition.surprise(likelihood, action, self.engine.context(self.belief)))
        self.memory.append(self.codes, next_codes, posterior, action, self.frame, step)
        if not self.freeze_belief:
            self.belief = self.engine.step(self.belief, self.memory.latest())
        self.frame = step.frame

    @torch.no_grad()
    def recall(self) -> None:
        """Rebuild the belief from the memory: after the models have changed in mid-lifetime."""
        if not self.freeze_belief:
            self.belief = self.engine(self.memory)

    def _random(self) -> Tensor:
        shape, device = (len(self.frame),), self.frame.device
        return torch.randint(self.engine.actions, shape, generator=self.generator, device=device)


class RandomAgent:
    """Acts at random in a house world: the bottom of the scale."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def begin(self, frames: Tensor) -> None:
        """Begin with the same luck in every lifetime."""
        self.batch, self.device = len(frames), frames.device
        self.generator = seeded(self.seed, stream=2, device=self.device)

    def act(self) -> Tensor:
        """Actions (B,) int64, all equally likely."""
        return torch.randint(N_ACTIONS, (self.batch,), generator=self.generator, device=self.device)

    def observe(self, action: Tensor, step: WorldStep) -> None:
        """Learn nothing."""


class ExactFilter:
    """The exact posterior over all rules of a house world, for a perfect eye; privileged, for references and tests.

    It reads positions from the world, never the rule. `nats` lists, for each step, -log p(what was seen | the past)
    (B,), the bar for any belief.
    """

    def __init__(self, world: HiddenRulesWorld) -> None:
        self.world = world

    def begin(self, frames: Tensor) -> None:
        """Believe every rule alike: `log_posterior` (B, N_TASKS)."""
        self.log_posterior = torch.full((len(frames), N_TASKS), -torch.tensor(N_TASKS).log().item(), device=frames.device)
        self.nats: list[Tensor] = []
        self.seen = self.world.by_colour(self.world.position)

    def observe(self, action: Tensor, step: WorldStep) -> None:
        """Bayes' rule on where everything went and on the reward; note how unexpected the former was."""
        arrived = self.world.by_colour(self.world.arrived_at)
        joint = self.log_posterior + log_likelihood(self.world, self.seen, action, arrived)
        self.nats.append(-joint.logsumexp(-1))
        joint = joint.masked_fill(~reward_consistent(arrived, step.reward), -torch.inf)
        self.log_posterior = joint.log_softmax(-1)
        self.seen = self.world.by_colour(self.world.position)


class KnownRuleAgent:
    """The planner that knows the hidden rule: the top of the scale. Privileged, as are all agents that take a world.

    Args:
        world: the world it acts in, which it may read.
        q: (S, S, S, move) float32, see `environment.value_iteration`.
    """

    def __init__(self, world: HiddenRulesWorld, q: Tensor) -> None:
        self.world, self.q = world, q.to(world.device)

    def begin(self, frames: Tensor) -> None:
        """Nothing to forget."""

    def observe(self, action: Tensor, step: WorldStep) -> None:
        """Nothing to learn."""

    def assumed_task(self) -> Tensor:
        """The tasks (B,) int64 to plan for."""
        return self.world.task

    def act(self) -> Tensor:
        """The best actions (B,) int64 if the assumed tasks were true."""
        action_map, colours = (part.to(self.world.device) for part in rule_of(self.assumed_task()))
        seen = self.world.by_colour(self.world.position)  # (B, colour, 2)
        cell = seen[..., 0] * self.world.settings.grid + seen[..., 1]
        body, goal, hazard = cell.gather(1, colours).unbind(1)
        return self.q[body, goal, hazard].gather(1, action_map).argmax(1)


class ThompsonAgent(KnownRuleAgent):
    """Thompson sampling on the exact filter: plans for one rule drawn from the posterior.

    Args:
        each: draw a new rule each "step" or each "episode".
        seed: of the draws.
    """

    def __init__(self, world: HiddenRulesWorld, q: Tensor, each: str, seed: int) -> None:
        super().__init__(world, q)
        if each not in ("step", "episode"):
            raise ValueError(f"each is {each!r}, but must be 'step' or 'episode'.")
        self.each, self.filter = each, ExactFilter(world)
        self.generator = seeded(seed, stream=3, device=world.device)

    def begin(self, frames: Tensor) -> None:
        """Draw the first assumption from the prior."""
        self.filter.begin(frames)
        self.assumed = self._draw()

    def observe(self, action: Tensor, step: WorldStep) -> None:
        """Update the posterior, and draw again where it is time."""
        self.filter.observe(action, step)
        renewed = (step.terminated | step.truncated) if self.each == "episode" else torch.ones_like(step.terminated)
        self.assumed = torch.where(renewed, self._draw(), self.assumed)

    def assumed_task(self) -> Tensor:
        """The tasks (B,) int64 drawn last."""
        return self.assumed

    def _draw(self) -> Tensor:
        return torch.multinomial(self.filter.log_posterior.exp(), 1, generator=self.generator)[:, 0]


def references(settings: WorldSettings, lifetimes: int, tasks: Tensor, seed: int, device: torch.device) -> dict[str, Lifetimes]:
    """The lifetimes of the agents to compare with, all in the same worlds: random, both Thompson samplers, known rule."""
    q = value_iteration(settings)

    def live(make: Callable) -> Lifetimes:
        world = HiddenRulesWorld(settings, lifetimes, tasks, seed, device)
        return play(world, make(world))

    return {
        "random": live(lambda world: RandomAgent(seed)),
        "thompson_step": live(lambda world: ThompsonAgent(world, q, "step", seed)),
        "thompson_episode": live(lambda world: ThompsonAgent(world, q, "episode", seed)),
        "known_rule": live(lambda world: KnownRuleAgent(world, q)),
    }
