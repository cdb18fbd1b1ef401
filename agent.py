"""Agents: the planner, the controller that infers, plans and acts, and the reference agents on the exact filter.

Every agent answers `begin(frames)`, `act() -> actions` and `observe(actions, step)`; `environment.play` drives any of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from context_engine import AppearanceEngine, ContextInferenceEngine, ExactFilter, Imagined
from environment import (
    N_ACTIONS, HiddenRulesWorld, Lifetimes, WorldSettings, WorldStep, by_role, play, require, rule_of, seeded, value_iteration,
)  # fmt: skip
from memory import EpisodicMemory, Experience
from transition_model import TransitionModel, pairs_present
from world_model import VAE, Value


@dataclass(frozen=True)
class PlannerSettings:
    """Planning and the value."""

    discount: float = 0.95
    """Of rewards, for each step, in (0, 1)."""
    mass: float = 0.85
    """Probability, in (0, 1], of the imagined outcomes and of the rewards that are followed; the least likely are left out."""
    promising: float = 0.2
    """Actions whose value comes within this of the best one's are looked at a second step ahead; 0 for none."""
    second_look: int = 20
    """Imagined steps of a state, at most so many for a second one: a vague belief is planned with one step."""
    imagine: bool = True
    """Plan with what would be known after an imagined step; without, information is worth nothing (as in QMDP)."""
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
        for name, low, high in (
            ("discount", 1e-3, 0.9999), ("mass", 1e-6, 1), ("promising", 0, 1e6), ("second_look", 0, 10**6),
            ("keypoints", 1, 1024), ("width", 1, 4096), ("trace", 0, 1), ("slow", 1e-6, 1), ("learning_rate", 0, 1),
        ):  # fmt: skip
            require(f"planner.{name}", getattr(self, name), low, high)


# -------------------------------------------------------------------------------------------------------- the planner


class Branches(NamedTuple):
    """N imagined steps from B states: what would happen, be known, and be worth from there on."""

    state: Tensor
    """(N,) int64: which state it starts from."""
    action: Tensor
    """(N,) int64."""
    weight: Tensor
    """(N,) float: its probability, given state and action."""
    reward: Tensor
    """(N,) float."""
    end: Tensor
    """(N,) float: probability that the episode ends with it."""
    fresh: Tensor
    """(N,) float: W, what a new episode would be worth with what is known then."""
    onward: Tensor
    """(N,) float: V, what going on would be."""
    effect: Tensor
    """(N,) int64: row of `codes`, and of `beliefs.others`."""
    rows: tuple[Tensor, Tensor]
    """(N,) int64 each: rows of `beliefs.own` and of `beliefs.world`."""
    codes: Tensor
    """(P, S) uint8: the grids of codes that the effects lead to."""
    beliefs: Imagined


class Planner:
    """A Bayes-adaptive step, a second one where it may change the choice, then the learnt value.

        Q(z, h, a) = sum_k pi(k|a, c) sum_r p(r|z, z'_k, c) [ r + discount ((1 - e) U(z'_k, h'_kr) + e W(c'_kr)) ]

    z'_k is the outcome's mode, e the probability that the episode ends, and h'_kr the belief after the imagined
    experience (a, k, r), c'_kr its context: the value of what an action teaches is part of the action's value. U is the
    learnt V(z', c'), and for actions that are close to the best one max_a' Q(z', h', a') under that belief, with V
    below it. Sources: Duff, "Optimal Learning", 2002 (Bayes-adaptive planning); Russell and Wefald, 1991 (search where
    it may change the decision).
    """

    def __init__(self, settings: PlannerSettings, transition: TransitionModel, engine: ContextInferenceEngine, value: Value) -> None:
        self.settings, self.transition, self.engine, self.value = settings, transition, engine, value

    STATES_AT_ONCE = 256  # bounds memory while the belief is still vague and branches are many

    @torch.no_grad()
    def action_values(self, codes: Tensor, belief: Tensor, again: bool = True) -> Tensor:
        """Q (B, A) of code grids (B, S) uint8 under beliefs (B, A + 1, H); without `again` U is V everywhere."""
        parts = zip(codes.split(self.STATES_AT_ONCE), belief.split(self.STATES_AT_ONCE))
        return torch.cat([self._action_values(*part, again) for part in parts])

    def _action_values(self, codes: Tensor, belief: Tensor, again: bool) -> Tensor:
        branches = self._imagine(codes, belief)
        values = self._back_up(branches, branches.onward, len(codes))
        if not again:
            return values
        promising = values > values.amax(1, keepdim=True) - self.settings.promising
        few = branches.state.bincount(minlength=len(codes)) <= self.settings.second_look
        promising &= (few & (promising.sum(1) > 1))[:, None]  # nothing to choose, nothing to look at
        looked = promising[branches.state, branches.action].nonzero()[:, 0]
        if len(looked) == 0:
            return values
        effect, onward = branches.effect[looked], branches.onward.clone()
        beliefs = branches.beliefs.belief(effect, branches.action[looked], *(row[looked] for row in branches.rows))
        onward[looked] = self.action_values(branches.codes[effect], beliefs, again=False).amax(1)
        return self._back_up(branches, onward, len(codes))

    def loss(self, value: Value, experience: Experience, beliefs: Tensor) -> dict[str, Tensor]:
        """Learn what states and fresh episodes are worth, from stored lifetimes and the planner's own look-ahead.

        Along each lifetime, backwards, with the slow value V-, W- (the planner's) and e_t = the episode ended at t:

            boot_t = lambda g_t+1 + (1 - lambda) after_t,    after_t = W-(c_t+1) if e_t else V-(z'_t, c_t+1)
            g_t    = (r_t + discount boot_t + max_a Q_t) / 2  where the action taken was the planner's choice,
                     max_a Q_t                                where it was not
            loss   = mean (V(z_t, c_t) - g_t)^2 + mean over first steps of episodes (W(c_t) - g_t)^2

        Time limits end episodes but not the lifetime, so they too lead to W. Q is the first look's, because a second
        one would cost several times as much.

        Args:
            value: learns.
            experience: (B, T, ...); beliefs: (B, T + 1, A + 1, H), without gradient.

        Returns:
            scalars by name: value and fresh, mean squared errors in squared units of reward.
        """
        B, T = experience.action.shape
        slow, context = self.value, self.engine.context(beliefs).detach()  # (B, T + 1, A + 1, D)
        codes, ended = experience.codes.flatten(0, 1), experience.terminated | experience.truncated
        best, choice = self.action_values(codes, beliefs[:, :-1].flatten(0, 1), again=False).view(B, T, -1).max(-1)
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

    def _imagine(self, codes: Tensor, belief: Tensor) -> Branches:
        transition, engine, value, mass = self.transition, self.engine, self.value, self.settings.mass
        context = engine.context(belief)

        # What can happen: outcomes that look alike from here are one, and take the mass of all.
        grids, alike = transition.outcome_network.modes(codes)  # (B, K, S), (B, K, K)
        kept, weight = branch(transition.log_prior(context[:, :-1]).exp() @ alike, mass)  # (B, A, K)
        state, outcome = kept.any(1).nonzero(as_tuple=True)  # P effects, shared by the actions
        index = torch.zeros(len(codes), kept.shape[-1], dtype=torch.int64, device=codes.device)  # of the effect, 0 to P - 1
        index[state, outcome] = torch.arange(len(state), device=codes.device)
        next_codes = grids[state, outcome]
        present = pairs_present(codes[state], next_codes, transition.codes)
        log_reward, end = transition.consequences(present, transition.consequence_table(context[:, -1])[state])
        rewarded, reward_weight = branch(log_reward.exp(), mass)  # (P, bins)
        posterior = transition.effect_of_alike(alike[state, :, outcome])  # (P, K)

        # What will be known then. Taken: an action has an effect; event: an effect comes with a reward.
        row, action, outcome = kept.nonzero(as_tuple=True)
        effect, (origin, bin_) = index[row, outcome], rewarded.nonzero(as_tuple=True)
        if self.settings.imagine:
            taken, event = (effect, action), (origin, transition.reward_bins[bin_])
            beliefs = engine.imagine(belief, state, posterior, present, taken, event)
        else:
            beliefs = Imagined(belief[state, :-1], belief[row, action], belief[state[origin], -1])
        pooled_actions, pooled_world = value.pool_shared(*map(engine.context, beliefs), effect, action)

        # A branch is a pair of the two with the same effect; and what it is worth.
        event_of = torch.zeros_like(rewarded, dtype=torch.int64)
        event_of[origin, bin_] = torch.arange(len(origin), device=codes.device)
        taken, bin_ = rewarded[effect].nonzero(as_tuple=True)
        effect = effect[taken]
        event = event_of[effect, bin_]
        pooled = torch.cat([pooled_actions[taken], pooled_world[event]], -1)
        return Branches(
            state=row[taken], action=action[taken], weight=weight[row, action, outcome][taken] * reward_weight[effect, bin_],
            reward=transition.reward_bins[bin_], end=torch.sigmoid(end)[effect], fresh=value.fresh(pooled),
            onward=value(value.statistics(next_codes)[effect], pooled), effect=effect, rows=(taken, event),
            codes=next_codes, beliefs=beliefs,
        )  # fmt: skip

    def _back_up(self, branches: Branches, onward: Tensor, states: int) -> Tensor:
        actions = self.engine.actions
        worth = branches.reward + self.settings.discount * torch.lerp(onward, branches.fresh, branches.end)
        q = torch.zeros(states * actions, device=worth.device)
        q.index_add_(0, branches.state * actions + branches.action, worth * branches.weight)
        return q.view(states, actions)


def branch(probability: Tensor, mass: float) -> tuple[Tensor, Tensor]:
    """Which entries (bool) of probabilities (..., n) make up the smallest set of at least `mass`, and these
    renormalised to one."""
    ordered, index = probability.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = torch.zeros_like(probability, dtype=torch.bool).scatter_(-1, index, (before < mass) & (ordered > 0))
    weight = probability * kept
    return kept, weight / weight.sum(-1, keepdim=True)


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
        planner: answers `action_values(codes, belief, again)`.
        lifetime: steps of a lifetime.
        appearance: infers how everything looks, and its context modulates the VAE; without it the world's row does.
        keep_pictures: keep the pictures in `memory`, for the store of past lifetimes.
        freeze_belief: never update the belief: the ablation that shows what adaptation is worth.
        look_again: plan with the second look, where the planner has one.
    """

    def __init__(
        self, vae: VAE, transition: TransitionModel, engine: ContextInferenceEngine, planner: Planner, lifetime: int,
        appearance: AppearanceEngine | None = None, keep_pictures: bool = False, freeze_belief: bool = False, look_again: bool = True,
    ) -> None:  # fmt: skip
        self.vae, self.transition, self.engine, self.planner = vae, transition, engine, planner
        self.lifetime, self.keep_pictures, self.freeze_belief = lifetime, keep_pictures, freeze_belief
        self.appearance, self.look_again = appearance, look_again
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
        self.frame, self.belief, self.look = frames, self.engine.initial_belief(len(frames)), None
        self.nats: list[Tensor] = []  # for each step, how unexpected it was (B,), as in ExactFilter

    @torch.no_grad()
    def act(self) -> Tensor:
        """Choose actions (B,) int64: greedy on the planner's values, or random where exploring."""
        self.vision = self._vision()  # the pair around this action is seen under one context
        self.codes = self.vae.encode(self.frame, self.vision)
        if self.exploration >= 1:  # no need to plan
            return self._random()
        action = self.planner.action_values(self.codes, self.belief, self.look_again).argmax(-1)
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
        return self.values().argmax(1)

    def values(self) -> Tensor:
        """Q (B, A) float32 if the assumed tasks were true."""
        action_map, colours = rule_of(self.assumed_task())
        seen = self.world.by_colour(self.world.position)  # (B, colour, 2)
        cell = seen[..., 0] * self.world.settings.grid + seen[..., 1]
        body, goal, hazard = cell.gather(1, colours).unbind(1)
        return self.q[body, goal, hazard].gather(1, action_map)


class ThompsonAgent(KnownRuleAgent):
    """Thompson sampling on the exact filter: plans for one rule drawn from the posterior.

    Args:
        each: draw a new rule each "step" or each "episode".
        seed: of the draws.
        options: of the `ExactFilter`.
    """

    def __init__(self, world: HiddenRulesWorld, q: Tensor, each: str, seed: int, **options: float) -> None:
        super().__init__(world, q)
        if each not in ("step", "episode"):
            raise ValueError(f"each is {each!r}, but must be 'step' or 'episode'.")
        self.each, self.filter = each, ExactFilter(world, **options)
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

    ROWS_AT_ONCE = 8192  # imagined lifetimes; bounds memory

    def __init__(
        self, world: HiddenRulesWorld, q: Tensor, seed: int, rollouts: int = 64, horizon: int = 16, certain: float = 0.01
    ) -> None:  # fmt: skip
        super().__init__(world, q, "step", seed)
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
        for rows in unsure.split(max(1, self.ROWS_AT_ONCE // self.rollouts)) if len(unsure) else ():
            action[rows] = self._mean_returns(rows).argmax(1)
        return action

    def _mean_returns(self, rows: Tensor) -> Tensor:
        """Means (n, A) over the imagined lifetimes of worlds `rows` (n,) that begin with each action."""
        each = rows.repeat_interleave(self.rollouts)
        log_posterior = self.filter.log_posterior[each]
        task = torch.multinomial(log_posterior.exp(), 1, generator=self.generator)[:, 0]
        position = by_role(self.world.by_colour(self.world.position)[each], rule_of(task))  # if that rule held
        unseen = replace(self.world.settings, noise=0, switch=0, switch_step=0)  # rules last for as long as it imagines
        self.imagined += 1
        means = []
        for action in range(N_ACTIONS):
            world = HiddenRulesWorld(unseen, len(each), task, self.imagined, self.world.device)
            world.place(task, position, self.world.age[each])
            returns = self._imagine(world, torch.full_like(task, action), log_posterior)
            means.append(returns.view(len(rows), self.rollouts).mean(1))
        return torch.stack(means, 1)

    def _imagine(self, world: HiddenRulesWorld, action: Tensor, log_posterior: Tensor) -> Tensor:
        """Returns (N,) of imagined worlds that begin with `action` (N,) under log posteriors (N, N_TASKS)."""
        agent = ThompsonAgent(world, self.q, "step", self.imagined)
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
    settings: WorldSettings, lifetimes: int, tasks: Tensor, seed: int, device: torch.device, rollouts: int = 0
) -> dict[str, Lifetimes]:  # fmt: skip
    """The lifetimes of the agents to compare with, all in the same worlds: random, both Thompson samplers, the known
    rule; where rules switch Thompson sampling that expects no switch, its likelihoods floored at .001; and with
    `rollouts` above 0 the Bayes-adaptive agent, which takes minutes to hours."""
    q = value_iteration(settings)

    def live(make: Callable) -> Lifetimes:
        world = HiddenRulesWorld(settings, lifetimes, tasks, seed, device)
        return play(world, make(world))

    lived = {
        "random": live(lambda world: RandomAgent(seed)),
        "thompson_step": live(lambda world: ThompsonAgent(world, q, "step", seed)),
        "thompson_episode": live(lambda world: ThompsonAgent(world, q, "episode", seed)),
        "known_rule": live(lambda world: KnownRuleAgent(world, q)),
    }
    if settings.switch:
        lived["expects_no_switch"] = live(lambda world: ThompsonAgent(world, q, "step", seed, switch=0, floor=1e-3))
    if rollouts > 0:
        lived["bayes_adaptive"] = live(lambda world: BayesAdaptiveAgent(world, q, seed, rollouts))
    return lived
