"""Inference of the hidden rule: learned by a GRU over experience, exact by Bayes' rule; and the reference agents.

The learned belief has A + 1 rows. Row a is the belief about action a. The last row, the world row, is the belief about
what is the same for all actions: which objects move, what reward they give. One GRU runs over all rows. Row a reads
every effect, marked as its own or another action's; the world row reads effects and rewards, but never the action.
Beside the state of the GRU a row keeps a sum: what each of its action's steps says of the action's effect, as Bayes'
rule adds up evidence. Hence the agent is equivariant under relabelling of the actions. What it learns about one
labelling holds for all, so it cannot memorize which action maps and roles occurred together in training. That actions
are exchangeable a priori is prior knowledge; the uniform prior of the exact filter over action maps contains the same.

Sources: Zintgraf et al., "VariBAD", ICLR 2020 (a recurrent belief trained to decode the whole lifetime); Kirsch et al.,
"Introducing Symmetries to Black Box Meta Reinforcement Learning", AAAI 2022 (one recurrent cell shared by all actions);
Cho et al., 2014 (the GRU); Zaheer et al., "Deep Sets", NeurIPS 2017 (a sum over the other actions).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from environment import MOVES, ExternalWorlds, HiddenRulesWorld, Rule, Split, WorldSettings
from environment import destination, make_worlds, order_by_role, rule_space_of, with_slips
from memory import EpisodicMemory, Experience, PlaceMemory, WorldStep, make_generator, require_all
from transition_model import TransitionModel, TransitionSettings, contact_pairs, describe_pairs, largest_of
from transition_model import occurring_pairs, pair_of
from world_model import Trajectories


@dataclass(frozen=True)
class ContextSettings:
    """Inference of the hidden rules."""

    hidden: int = 64  # size H of the GRU's state in each row of the belief, at least 1
    context: int = 32  # size D of each row of the context, at least 1
    contact_features: int = 64  # contact features in a token of the world row, at least 1
    token_scale: float = 5.0  # factor on PyTorch's initial token weights: tokens are sparse, yet each must count
    context_scale: float = 3.0  # factor on PyTorch's initial weights from belief or patches to context, at least 0
    # weight of predicting the effects at other times, at least 0; with 0, reward and termination too only at their own
    decoding_weight: float = 2.0
    appearance: int = 0  # patch features in a token of the appearance; 0 where all lifetimes look the same
    # Adam's initial rate of engine, prior, reward and termination, which decays with the run; and of the appearance
    # while perception is trained alone, after that vae.late_lr
    learning_rate: float = 8e-3

    def __post_init__(self) -> None:
        sizes = dict.fromkeys(("hidden", "context", "contact_features"), (1, 4096))
        scales = dict.fromkeys(("token_scale", "context_scale", "decoding_weight"), (0, 1000))
        require_all("context", self, **sizes, **scales, appearance=(0, 4096), learning_rate=(0, 1))


class ContextInferenceEngine(nn.Module):
    """The belief (B, A + 1, H + K) about the hidden rule, and the context (B, A + 1, D) that modulates the models.

    A row of the belief is the state (H) of the GRU and the log-evidence (K) for each effect, see `_evidence`. The
    recurrent state is passed explicitly, by `initial_belief`, `step` and `sequence`. `engine(memory)` is the belief
    after a memory.

    Args:
        settings: see `ContextSettings`.
        actions: A.
        codes: C, categories of a patch.
        num_effects: K, see `set_num_effects`.
        fixed: actions that do the same in every task: what is known of them beforehand is learnt for each of them.
    """

    def __init__(
        self, settings: ContextSettings, actions: int, codes: int, num_effects: int = 1, fixed: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.settings, self.actions, self.codes = settings, actions, codes
        hidden = settings.hidden
        self.contact_features = nn.Linear(2 * codes, settings.contact_features)
        self.gru = nn.GRU(hidden, hidden, batch_first=True)
        # Initial beliefs: about an action that is shuffled, about the world, about each of the others.
        self.initial = nn.Parameter(torch.zeros(2 + len(fixed), hidden))
        own = [2 + fixed.index(action) if action in fixed else 0 for action in range(actions)]
        self.register_buffer("initial_row", torch.tensor([*own, 1]), persistent=False)
        self.log_floor = nn.Parameter(torch.tensor(math.log(0.1)))
        self.register_buffer("pairs", describe_pairs(codes), persistent=False)
        self.set_num_effects(num_effects)
        with torch.no_grad():
            self.gru.bias_ih_l0[hidden : 2 * hidden] = 1.0  # update gate: remember by default

    def set_num_effects(self, num_effects: int) -> None:
        """Make the layers that read K effects anew."""
        settings, hidden, device = self.settings, self.settings.hidden, self.initial.device
        self.num_effects = num_effects
        self.own_effect = nn.Linear(2 * num_effects, hidden, device=device)
        self.others_effect = nn.Linear(2 * num_effects, hidden, device=device)
        self.world_event = nn.Linear(2 * num_effects + 1 + settings.contact_features, hidden, device=device)
        self.of_others = nn.Linear(hidden + num_effects, hidden, device=device)
        self.to_context = nn.Linear(2 * hidden + num_effects, settings.context, device=device)
        with torch.no_grad():
            for layer in (self.of_others, self.to_context):
                layer.weight.mul_(settings.context_scale)
            for layer in (self.own_effect, self.others_effect, self.world_event):
                layer.weight.mul_(settings.token_scale)

    def initial_belief(self, batch: int) -> Tensor:
        """The belief before any experience: (batch, A + 1, H + K)."""
        return F.pad(self.initial[self.initial_row], (0, self.num_effects)).expand(batch, -1, -1)

    def context(self, belief: Tensor) -> Tensor:
        """The context (..., A + 1, D) of a belief (..., A + 1, H + K): row a is action a's, the last the world's.

            c_a = W [b_a, sum over all other actions a' of silu(V b_a')],  c_world = W [b_world, 0],
            b_a = [h_a, softmax(l_a)]: the state of the GRU and what the log-evidence says

        What the others are known to do, this one hardly does too: so one knows something of actions never taken.
        """
        state, evidence = self._parts(belief)
        belief = torch.cat([state, evidence.softmax(-1)], -1)
        features = F.silu(self.of_others(belief[..., :-1, :]))
        others = features.sum(-2, keepdim=True) - features
        return self.to_context(torch.cat([belief, F.pad(others, (0, 0, 0, 1))], -1))

    def step(self, belief: Tensor, experience: Experience) -> Tensor:
        """The belief (B, A + 1, H + K) after one more step; `experience` has T = 1."""
        state, evidence = self._parts(belief)
        tokens = self._tokens(experience, evidence[:, None])
        _, last = self.gru(tokens.view(-1, 1, tokens.shape[-1]), state.reshape(1, -1, state.shape[-1]))
        return torch.cat([last.view(state.shape), evidence + self._evidence(experience)[:, 0]], -1)

    def sequence(self, experience: Experience) -> Tensor:
        """All beliefs of lifetimes from their start: (B, T + 1, A + 1, H + K); index t is the belief before step t."""
        B, T = experience.action.shape
        rows, (initial, _) = self.actions + 1, self._parts(self.initial_belief(B))  # initial (B, A + 1, H)
        evidence = F.pad(self._evidence(experience).cumsum(1), (0, 0, 0, 0, 1, 0))  # (B, T + 1, A + 1, K)
        tokens = self._tokens(experience, evidence[:, :-1]).transpose(1, 2).reshape(B * rows, T, -1)
        states, _ = self.gru(tokens, initial.reshape(1, B * rows, -1))
        states = states.view(B, rows, T, -1).transpose(1, 2)  # (B, T, A + 1, H)
        return torch.cat([torch.cat([initial[:, None], states], 1), evidence], -1)

    def forward(self, memory: EpisodicMemory) -> Tensor:
        """The belief (B, A + 1, H + K) after everything in `memory`."""
        return self.sequence(memory.experience())[:, -1]

    def _parts(self, belief: Tensor) -> tuple[Tensor, Tensor]:
        """The state (..., H) of the GRU and the log-evidence (..., K) of a belief."""
        state, evidence = belief.split([self.settings.hidden, self.num_effects], -1)
        return state.contiguous(), evidence  # cuDNN's GRU takes no other

    def _evidence(self, experience: Experience) -> Tensor:
        """What each step adds to the log-evidence: (B, T, A + 1, K), zeros for all rows but that of the action taken.

            l_a(k) = sum over the steps t that took a of log(q_t(k) / max q_t + e),  e = exp(log_floor) learnt

        With e > 0 no step rules an effect out, because an action can fail.
        """
        taken, posterior = F.one_hot(experience.action, self.actions + 1), experience.posterior.float()
        share = posterior / posterior.amax(-1, keepdim=True).clamp_min(1e-6)
        return taken[..., None] * torch.log(share + self.log_floor.exp())[:, :, None]

    def _tokens(self, experience: Experience, evidence: Tensor) -> Tensor:
        """The input of every row of the belief: (B, T, A + 1, H), read off the effect of a step, and what the
        log-evidence (B, T, A + 1, K) before it said of the action taken."""
        taken = experience.action[..., None, None].expand(-1, -1, 1, self.num_effects)
        expected = evidence.gather(2, taken).squeeze(2).softmax(-1)
        effect = torch.cat([experience.posterior.float(), expected], -1)  # (B, T, 2K)
        own = F.one_hot(experience.action, self.actions)[..., None].bool()  # (B, T, A, 1)
        effects = torch.where(own, self.own_effect(effect)[:, :, None], self.others_effect(effect)[:, :, None])
        return torch.cat([effects, self._world_token(experience, effect)[:, :, None]], 2)

    def _world_token(self, experience: Experience, effect: Tensor) -> Tensor:
        """The input (B, T, H) of the world row: effects, rewards, and contact features, the maximum over contact pairs.

        Contact features are multiplied by the reward. So a step without reward is no evidence about reward values, and
        only the n steps with one are computed.
        """
        reward = experience.reward
        rewarded = reward.nonzero(as_tuple=True)
        pair = pair_of(experience.codes[rewarded], experience.next_codes[rewarded], self.codes)  # (n, S)
        present = contact_pairs(pair, self.codes)  # (n, C*C)
        occurring = occurring_pairs(present)
        step, pair = present[:, occurring].nonzero(as_tuple=True)
        features = F.silu(self.contact_features(self.pairs[occurring]))
        contact = largest_of(features, pair, step, len(present)) * reward[rewarded][:, None]
        contact = reward.new_zeros(*reward.shape, contact.shape[-1]).index_put(rewarded, contact)
        return self.world_event(torch.cat([effect, reward[..., None], contact], -1))

    def loss(
        self, experience: Experience, transition: TransitionModel, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Learn to infer: predict the next effect, and decode the whole lifetime from the belief at a random time.

            filter   = mean over (B, T) of  -log sum_k q_t(k) pi(k | a_t, c_t)
            decoding = weight * mean over (B, T) of  -log sum_k q_t(k) pi(k | a_t, c_t'),   t' random, past or future,
        of those t whose t' lies in the same segment, here and below: another rule's effects are no valid target
            reward, termination = cross-entropies of sampled steps under c_t' and what the memory of places held at t',
            t' random, with what the episode had earned before t; the means over steps with an event (a termination or
            an unusual reward) and over steps without are added, because events are rare, and the logits of events are
            shifted by as much as they count more, so that the heads predict how often they happen (Menon et al.,
            "Long-tail Learning via Logit Adjustment", 2021)

        Gradients reach the engine and the contextual parameters of `transition`; codes and effect posteriors are
        constants.

        Returns scalars in nats by name, and the beliefs (B, T + 1, A + 1, H + K) without gradient, for experience
        (B, T, ...). The generator makes the random times and steps.
        """
        B, T = experience.action.shape
        beliefs = self.sequence(experience)
        action, posterior = experience.action.flatten(), experience.posterior.float().flatten(0, 1)
        row = torch.arange(B, device=action.device).repeat_interleave(T)
        step = torch.arange(T, device=action.device).repeat(B)
        time, valid = self._other_times(experience.segment, row, step, generator)

        contexts = self.context(beliefs).flatten(0, 2)

        def context_at(row: Tensor, time: Tensor, of: Tensor | int) -> Tensor:
            return contexts.index_select(0, (row * (T + 1) + time) * (self.actions + 1) + of)

        own = context_at(row.repeat(2), torch.cat([step, time]), action.repeat(2))
        filtered, decoded = transition.prior_loss(own, posterior.repeat(2, 1)).chunk(2)
        weight = self.settings.decoding_weight
        losses = {"filter": filtered.mean(), "decoding": weight * (decoded * valid).sum() / valid.sum().clamp_min(1)}

        event, n = experience.events.flatten(), max(1, B * T // 5)
        share = event.float().mean().clamp(0.5 / (B * T), 1 - 0.5 / (B * T))
        odds = ((1 - share) / share).log()  # how much more an event counts than another step
        kinds = (kind.nonzero()[:, 0] for kind in (event, ~event))
        draws = [x[torch.randint(len(x), (n,), generator=generator, device=x.device)] for x in kinds if len(x)]
        steps = torch.cat(draws)
        time, valid = self._other_times(experience.segment, row[steps], step[steps], generator)
        valid = valid.view(-1, n) / valid.view(-1, n).sum(1, keepdim=True).clamp_min(1)
        parts = (experience.codes, experience.next_codes, experience.reward, experience.terminated)
        codes, next_codes, reward, terminated = (part.flatten(0, 1)[steps] for part in parts)
        places = PlaceMemory.before_steps(experience, self.codes)
        modulation = transition.modulate_heads(contexts.view(B, T + 1, self.actions + 1, -1)[:, :-1, -1].flatten(0, 1))
        then = (codes, next_codes, places, modulation, row[steps] * T + time)
        happened = (reward, terminated, experience.usual_reward, odds)
        terms = transition.reward_and_termination_loss(*happened, *then, earned=places.earned[steps])
        losses |= {name: (term.view(-1, n) * valid).sum() for name, term in terms.items()}
        return losses, beliefs.detach()

    def _other_times(
        self, segment: Tensor, row: Tensor, step: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """A random time (N,) for each step (N,) of lifetimes `row` (N,), and whether both lie in one segment (float).

        Without decoding, each step keeps its time.
        """
        if self.settings.decoding_weight == 0:
            return step, torch.ones(len(row), device=row.device)
        time = torch.randint(segment.shape[1], row.shape, generator=generator, device=row.device)
        return time, (segment[row, time] == segment[row, step]).float()


class AppearanceEngine(nn.Module):
    """Infers how this lifetime looks: another recurrent row, whose context modulates perception only.

    Its token is the mean of features of a frame's patches. It is separate from the belief about the rules, because its
    evidence is different (frames, not effects) and because the bound of the VAE trains it: as in variBAD, every part of
    a belief learns from what must be decoded with it.

    Args:
        settings: see `ContextSettings`; `appearance` must be above 0.
        pixels: numbers in a patch, P.
    """

    def __init__(self, settings: ContextSettings, pixels: int) -> None:
        super().__init__()
        self.features = nn.Linear(pixels, settings.appearance)
        self.gru = nn.GRU(settings.appearance, settings.hidden, batch_first=True)
        self.to_context = nn.Linear(settings.hidden, settings.context)
        with torch.no_grad():
            for weight in (self.features.weight, self.gru.weight_ih_l0):
                weight.mul_(settings.context_scale)

    def sequence(self, patches: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Contexts (B, T, D) under which to encode frames, each inferred from the frames up to its own.

        `patches` (B, T, S, P) float32 come from `VAE.patches`. `state` (1, B, H) is the state after earlier frames,
        None at the start of a lifetime; the state after the last frame is returned, too.
        """
        states, last = self.gru(F.silu(self.features(patches)).mean(2), state)
        return self.to_context(states), last

    def unseen(self) -> Tensor:
        """The context (D,) before any frame."""
        return self.to_context(torch.zeros(self.gru.hidden_size, device=self.to_context.weight.device))


def spread_over_rules(world: HiddenRulesWorld, by_case: Tensor) -> Tensor:
    """Expand cases (B, map, wind and edges, colour) to every rule: (B, rules), in the order of the task numbers."""
    return by_case[..., world.space.colours[:, 0].to(by_case.device)].transpose(1, 2).flatten(1)


def likelihood_by_case(world: HiddenRulesWorld, before: Tensor, action: Tensor, after: Tensor) -> Tensor:
    """Log-likelihood of how ground-truth positions changed: (B, map, wind and edges, colour) float32, in nats.

    A case is what matters of a rule here: the action map, wind and edges, and the colour of the body.

    Args:
        world: for its settings and walls; its rule is not read.
        before, after: (B, colour, 2) int64, positions by colour before and after the step, before any restart.
        action: (B,) int64.
    """
    s, space, device = world.settings, world.space, before.device
    wraps, wind, strength = (part.to(device) for part in (space.wraps, space.wind, space.strength))
    place = before[:, :, None, None].expand(-1, -1, len(wraps), len(MOVES), -1)  # (B, colour, edges, move, 2)
    landed = destination(place, MOVES.to(device), wraps[:, None], s.grid, world.walls)
    reached = (landed == after[:, :, None, None]).all(-1).float()  # (B, colour, edges, move)
    probability = with_slips(s, reached)[:, :, None].expand(-1, -1, len(wind), -1, -1)  # (B, colour, wind, edges, move)
    if s.wind:
        gust = reached[..., wind].permute(0, 1, 3, 2)[..., None]  # (B, colour, wind, edges, 1)
        probability = torch.lerp(probability, gust, strength[:, None, None])
    moved = (before != after).any(-1)  # (B, colour)
    alone = moved.sum(1, keepdim=True) == moved.long()  # nothing but the body can move
    probability = probability * alone[:, :, None, None, None]
    by_move = probability.log().permute(0, 4, 2, 3, 1).flatten(2, 3)  # (B, move, wind and edges, colour)
    return by_move[torch.arange(len(action), device=device)[:, None], space.action_maps.to(device).T[action]]


def reward_consistent(world: HiddenRulesWorld, after: Tensor, reward: Tensor) -> Tensor:
    """Which role assignments explain `reward` (B,) at positions by colour `after` (B, colour, 2): (B, R) bool."""
    roles = world.space.colours.to(after.device)
    place = after[:, roles]  # (B, role assignment, role, 2)
    expected = (place[:, :, :1] == place[:, :, 1:]).all(-1).float() @ world.reward_values
    return expected == reward[:, None]


class ExactFilter:
    """The exact posterior over all rules of a built-in environment, from ground-truth states; for references and tests.

    It sees positions by colour, as frames show them, and rewards, never the rule. `log_posterior` (B, rules) is the
    belief. `nll` lists for each step the negative log-likelihood of the new positions, -log p(positions | past) (B,) in
    nats: no belief can do better on average over tasks sampled from all rules.

    Args:
        world: the environment it observes.
        switch: probability that the rule changes after a step; None for the environment's own.
        floor: lower bound of every likelihood. A filter that does not expect a switch needs it to recover from one,
            because otherwise the true rule would keep probability 0.
    """

    CHUNK = 1 << 22  # numbers processed at once; several times faster if they fit into the cache

    def __init__(self, world: HiddenRulesWorld, switch: float | None = None, floor: float = 0.0) -> None:
        self.world, self.floor = world, floor
        self.switch = world.settings.switch if switch is None else switch

    def reset(self, frames: Tensor) -> None:
        """Start from the uniform prior over rules; of `frames` only the batch size and device count."""
        rules = len(self.world.space)
        self.log_posterior = torch.full((len(frames), rules), -math.log(rules), device=frames.device)
        self.nll: list[Tensor] = []
        self.before = self.world.order_by_colour(self.world.position)

    def observe(self, action: Tensor, step: WorldStep) -> None:
        """Apply Bayes' rule to the new positions and the reward."""
        after = self.world.order_by_colour(self.world.next_position, self.world.step_rule)
        least = math.log(self.floor) if self.floor else -math.inf
        by_case = likelihood_by_case(self.world, self.before, action, after).clamp_min(least)
        by_roles = torch.where(reward_consistent(self.world, after, step.reward), 0.0, least)  # (B, R)
        nll, posterior = [], []
        rows = max(1, self.CHUNK // len(self.world.space))
        chunks = (part.split(rows) for part in (self.log_posterior, by_case, by_roles))
        for prior, case, roles in zip(*chunks, strict=True):
            joint = prior + spread_over_rules(self.world, case)  # (rows, rules)
            nll.append(-joint.logsumexp(-1))
            joint = (joint.view(len(joint), -1, roles.shape[1]) + roles[:, None]).flatten(1).log_softmax(-1)
            if self.switch:
                joint = joint + math.log1p(-self.switch)
                joint = torch.logaddexp(joint, torch.full_like(joint, math.log(self.switch / joint.shape[1])))
            posterior.append(joint)
        self.nll.append(torch.cat(nll))
        self.log_posterior = torch.cat(posterior)
        self.before = self.world.order_by_colour(self.world.position)


class ActionValues:
    """Values of moves in an environment whose rule is known, by value iteration.

        Q(s, m) = E[r + discount * V(s')],  V(s) = max_m Q(s, m),  where V(s') = W if the episode ends in s'

    As the lifetime goes on, W is the mean value of an episode's first state under the same edges and wind: over all
    arrangements of the objects, or if these are more than 4096 or there are walls, over 1024 random ones, with layouts
    of walls. The time limit of episodes is ignored, because the frame does not show it. Small environments are solved
    once for all arrangements, larger ones in every call.

    Args:
        settings: of the environment.
        discount: per step.
        tolerance: largest change of a value in the last iteration.
        device: of the values.
    """

    PLACES = 4096  # largest number of arrangements of the objects that are enumerated
    TABLE = 1 << 23  # numbers in the largest table that is kept

    def __init__(
        self,
        settings: WorldSettings,
        discount: float = 0.95,
        tolerance: float = 1e-4,
        device: torch.device | str = "cpu",
    ) -> None:
        self.settings, self.discount, self.tolerance, self.device = settings, discount, tolerance, torch.device(device)
        self.space = rule_space_of(settings)
        self.reward_values = torch.tensor(settings.reward_values, dtype=torch.float32, device=device)
        axis = torch.arange(settings.grid, device=device)
        self.cells = torch.cartesian_prod(axis, axis)  # (S, (row, column))
        S, objects = settings.grid**2, len(settings.reward_values)
        physics = len(self.space.wind) * len(self.space.wraps)  # combinations of wind and edges
        enumerable = S**objects <= self.PLACES and not settings.walls
        if enumerable:
            at, walls = torch.cartesian_prod(*[torch.arange(S)] * objects).view(-1, objects).to(device), None
        else:
            sample = HiddenRulesWorld(settings, 1024, torch.zeros(1, dtype=torch.int64), seed=0, device=device)
            sample.reset()
            at, walls = self._cell(sample.position[:, 1:]), sample.walls
        tasks = torch.arange(physics, device=device) * self.space.pairs  # one for each wind and edges
        solved = [self._iterate(at, self.space.rule(task.expand(len(at))), walls, None) for task in tasks]
        self.reset_value = torch.stack([value for _, value in solved])  # W (physics,)
        small = enumerable and physics * S ** (objects + 1) * len(MOVES) <= self.TABLE
        self.table = torch.stack([q for q, _ in solved]) if small else None  # (physics, arrangements, S, move)

    def __call__(self, world: HiddenRulesWorld, task: Tensor, position: Tensor) -> Tensor:
        """Q (B, move) float32 under assumed tasks (B,) int64, with body and objects at `position` (B, role, 2)."""
        cell = self._cell(position)
        physics, rows = task // self.space.pairs, torch.arange(len(task), device=self.device)
        if self.table is None:
            q, _ = self._iterate(cell[:, 1:], self.space.rule(task), world.walls, self.reset_value[physics])
            return q[rows, cell[:, 0]]
        arrangement = torch.zeros_like(physics)
        for at in cell[:, 1:].unbind(1):
            arrangement = arrangement * self.settings.grid**2 + at
        return self.table[physics, arrangement, cell[:, 0]]

    def _cell(self, place: Tensor) -> Tensor:
        """Indices (...) of the cells at (row, column) `place` (..., 2)."""
        return place[..., 0] * self.settings.grid + place[..., 1]

    def _iterate(
        self, at: Tensor, rule: Rule, walls: Tensor | None, reset_value: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Q (n, S, move), objects in cells `at` (n, object), and W, the rows' mean if `reset_value` (n,) is None."""
        s, n, S = self.settings, len(at), len(self.cells)
        place, moves = self.cells[None, :, None].expand(n, -1, len(MOVES), -1), MOVES.to(self.device)[None, None]
        to = self._cell(destination(place, moves, rule.wraps[:, None, None], s.grid, walls)).flatten(1)  # (n, S * move)
        reward = torch.zeros(n, S, device=self.device).scatter_(1, at, self.reward_values.expand(n, -1))
        ends = torch.zeros(n, S, dtype=torch.bool, device=self.device).scatter_(1, at, True)
        start = ~ends if walls is None else ~ends & ~walls.flatten(1)
        start &= (at.sort(1).values.diff(dim=1) != 0).all(1)[:, None]  # two objects in one cell cannot occur
        available = min(s.actions, len(MOVES))  # not moving is an action only if there are more than four
        value = torch.zeros(n, S, device=self.device)
        for _ in range(math.ceil(math.log(self.tolerance) / math.log(self.discount))):
            mean = value.T[start.T].mean().expand(n) if reset_value is None else reset_value
            landed = torch.where(ends, reward + self.discount * mean[:, None], self.discount * value)
            by_move = landed.gather(1, to).view(n, S, len(MOVES))
            q = with_slips(s, by_move)
            if s.wind:
                gust = by_move.gather(2, rule.wind[:, None, None].expand(-1, S, -1))
                q = torch.lerp(q, gust, rule.strength[:, None, None])
            previous, value = value, q[..., :available].amax(-1)
            if (value - previous).abs().max() < self.tolerance:
                break
        return q, mean[0]


class KnownRuleAgent:
    """Plans with the hidden rule: the upper reference. Privileged, as are all agents that are given the environment.

    Args:
        world: the environment it acts in, which it may read.
        q: values of moves in such environments.
    """

    def __init__(self, world: HiddenRulesWorld, q: ActionValues) -> None:
        self.world, self.q = world, q

    def reset(self, frames: Tensor) -> None:
        """Nothing to reset."""

    def observe(self, action: Tensor, step: WorldStep) -> None:
        """Nothing to learn."""

    def assumed_task(self) -> Tensor:
        """The tasks (B,) int64 to plan for."""
        return self.world.task

    def act(self) -> Tensor:
        """The best actions (B,) int64 under the assumed tasks."""
        return self.values().argmax(1)

    def values(self) -> Tensor:
        """Q (B, A) float32 under the assumed tasks."""
        task = self.assumed_task()
        rule = self.world.space.rule(task)
        position = order_by_role(self.world.order_by_colour(self.world.position), rule)
        return self.q(self.world, task, position).gather(1, rule.action_map)


class ThompsonAgent(KnownRuleAgent):
    """Thompson sampling on the exact filter: plans for one rule, sampled anew from the posterior at every step.

    Args:
        world, q: as in `KnownRuleAgent`.
        seed: of the samples.
        options: of the `ExactFilter`.
    """

    def __init__(self, world: HiddenRulesWorld, q: ActionValues, seed: int, **options: float) -> None:
        super().__init__(world, q)
        self.filter = ExactFilter(world, **options)
        self.generator = make_generator(seed, stream=3, device=world.device)

    def reset(self, frames: Tensor) -> None:
        """Sample the first task from the prior."""
        self.filter.reset(frames)
        self.assumed = self.sample_task(self.filter.log_posterior)

    def observe(self, action: Tensor, step: WorldStep) -> None:
        """Update the posterior and sample again."""
        self.filter.observe(action, step)
        self.assumed = self.sample_task(self.filter.log_posterior)

    def assumed_task(self) -> Tensor:
        """The tasks (B,) int64 sampled last."""
        return self.assumed

    def sample_task(self, log_posterior: Tensor) -> Tensor:
        """One task (n,) int64 for each of the log posteriors (n, rules).

        Wind and edges are sampled first, then the rest: two small samples are much cheaper than one over all rules.
        """
        by_physics = log_posterior.unflatten(1, (-1, self.world.space.pairs))  # (n, wind and edges, pairs)
        physics = torch.zeros(len(by_physics), 1, dtype=torch.int64, device=by_physics.device)
        if by_physics.shape[1] > 1:
            physics = torch.multinomial(by_physics.logsumexp(2).exp(), 1, generator=self.generator)
        pairs = by_physics.take_along_dim(physics[..., None], 1)[:, 0]
        pair = torch.multinomial(pairs.exp(), 1, generator=self.generator)
        return (physics * self.world.space.pairs + pair)[:, 0]


class AdvisedAgent:
    """Does what an external environment says that the reference agent `name` would do; see `environment.ADVICE`."""

    def __init__(self, world: ExternalWorlds, name: str) -> None:
        self.world, self.name = world, name

    def reset(self, obs: Tensor) -> None:
        """Nothing to reset: the environment knows the task."""

    def act(self) -> Tensor:
        """Actions (B,) int64."""
        return self.world.advice(self.name)

    def observe(self, action: Tensor, step: WorldStep) -> None:
        """Nothing to learn: the environment saw it itself."""


class RandomAgent:
    """Acts at random, by a seed, with `actions` to choose from: the bottom of the scale."""

    def __init__(self, seed: int, actions: int = 4) -> None:
        self.seed, self.actions = seed, actions

    def reset(self, obs: Tensor) -> None:
        """Begin every lifetime with the same random stream."""
        self.batch, self.device = len(obs), obs.device
        self.generator = make_generator(self.seed, stream=2, device=self.device)

    def act(self) -> Tensor:
        """Actions (B,) int64, all equally likely."""
        return torch.randint(self.actions, (self.batch,), generator=self.generator, device=self.device)

    def observe(self, action: Tensor, step: WorldStep) -> None:
        """Learn nothing."""


def rollout(world: HiddenRulesWorld | ExternalWorlds, agent: Any, observers: Sequence[Any] = ()) -> Trajectories:
    """Roll out one lifetime in every environment of `world`.

    Args:
        agent: answers `reset(obs)`, `act() -> actions (B,) int64` and `observe(actions, step)`.
        observers: answer `reset` and `observe`.
    """
    obs, happened = world.reset(), []
    for listener in (agent, *observers):
        listener.reset(obs)
    for _ in range(world.settings.lifetime):
        action = agent.act()
        step = world.step(action)
        for listener in (agent, *observers):
            listener.observe(action, step)
        happened.append((step.reward, step.terminated, step.truncated, world.step_segment))
    return Trajectories(*(torch.stack(part, 1).cpu() for part in zip(*happened, strict=True)))


def infer_reward_bins(world: WorldSettings, lifetimes: int = 16, most: int = 4) -> tuple[float, ...]:
    """Reward bins: 0 and the reward values of the objects.

    Of an external environment nothing is known, so they are inferred from random lifetimes: 0, and on either side the
    rewards seen if these are at most `most`, else as many evenly spaced ones up to the largest seen. They reach at
    least to 1, because an agent that learns earns more than a random one. -1, 0, 1 if there was no reward at all.
    """
    if not world.gym_id:
        return tuple(sorted({0.0, *map(float, world.reward_values)}))
    worlds = make_worlds(world, lifetimes, "train", seed=0)
    seen = rollout(worlds, RandomAgent(0, world.sizes.actions)).reward
    if not seen.any():
        return TransitionSettings().reward_bins
    bins = {0.0, max(1.0, float(seen.max()))}
    for values in (seen[seen > 0].unique().tolist(), seen[seen < 0].unique().tolist()):
        if len(values) > most:
            largest = math.copysign(max(1.0, *map(abs, values)), values[0])
            values = [largest * k / most for k in range(1, most + 1)]
        bins |= set(values)
    return tuple(sorted({float(str(np.float32(x))) for x in bins}))  # the shortest decimals that are these numbers


def require_room(world: WorldSettings, lifetimes: int, numbers: int = 1 << 28) -> None:
    """Raise ValueError where the exact filter over all rules of so many lifetimes would need several gigabytes."""
    rules = 0 if world.gym_id else len(rule_space_of(world))
    if rules * lifetimes > numbers:
        raise ValueError(
            f"this world has {rules:,} rules, too many for the exact filter to follow {lifetimes:,} lifetimes at once: "
            f"evaluate on at most {numbers // rules:,} (training.evaluation_lifetimes, or --lifetimes)."
        )


@functools.lru_cache(maxsize=1)  # several agents may be evaluated in the same environments
def references(
    settings: WorldSettings, lifetimes: int, split: Split, seed: int, device: torch.device
) -> dict[str, Trajectories]:
    """Rollouts of the reference agents: random and, where there is an exact solution or an external environment offers
    one, Thompson and known rule."""
    require_room(settings, lifetimes)
    makers: dict[str, Callable] = {"random": lambda world: RandomAgent(seed, settings.sizes.actions)}
    if not settings.gym_id:
        q = ActionValues(settings, device=device)
        makers["thompson"] = lambda world: ThompsonAgent(world, q, seed)
        makers["known_rule"] = lambda world: KnownRuleAgent(world, q)
    else:
        makers |= {name: functools.partial(AdvisedAgent, name=name) for name in settings.sizes.advisors}
    rollouts = {}
    for name, make in makers.items():
        world = make_worlds(settings, lifetimes, split, seed, device)
        rollouts[name] = rollout(world, make(world))
    return rollouts
