"""Inference: a GRU that turns the memory of a lifetime into a belief about its hidden rules, and the exact filter.

The belief has A + 1 rows. Row a holds what is believed about action a, the last row what is believed about the world
whatever the action (what moves, what is worth something). All rows run through one GRU: row a reads every effect marked
"mine" or "of another action", the last row reads effects and rewards and never which action was taken. Hence the agent
is equivariant under relabelling of the actions: what it learns about one labelling holds for all of them, so it cannot
memorise which action maps and roles occurred together in training. That actions are exchangeable beforehand is prior
knowledge, the same that the exact filter's uniform prior over action maps holds.

Sources: Zintgraf et al., "VariBAD", ICLR 2020 (a recurrent belief trained to decode the whole lifetime); Kirsch et al.,
"Introducing Symmetries to Black Box Meta Reinforcement Learning", AAAI 2022 (one recurrent cell shared by all actions);
Cho et al., 2014 (the GRU).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from environment import DIRECTIONS, MOVES, HiddenRulesWorld, Rule, WorldSettings, order_by_role, destination, with_slips, rule_space_of
from memory import EpisodicMemory, Experience, WorldStep, require_all, make_generator
from transition_model import ABSENT, TransitionModel, pair_codes, contact_pairs


@dataclass(frozen=True)
class ContextSettings:
    """Inference of the hidden rules."""

    hidden: int = 64
    """Size H of each row of the belief, at least 1."""
    context: int = 32
    """Size D of each row of the context vector, at least 1."""
    contact_features: int = 16
    """Features of what contact_features what, in a token, at least 1."""
    token_scale: float = 10.0
    """Initial scale of the token's weights over PyTorch's default: tokens are sparse, and each must be felt at once."""
    context_scale: float = 3.0
    """Initial scale of belief to context over PyTorch's default."""
    decoding_weight: float = 2.0
    """Weight of predicting the num_effects of other times of the lifetime, at least 0; with 0 rewards and ends too are only
    predicted at their own time."""
    appearance: int = 0
    """Features of a picture's patches in the token of its appearance; 0 for a world that always looks the same."""
    learning_rate: float = 4e-3
    """Adam's, of the engine, the outcome prior and the reward_and_termination; it decays with the run."""

    def __post_init__(self) -> None:
        require_all(
            "context", self, hidden=(1, 4096), context=(1, 4096), contact_features=(1, 4096), token_scale=(0, 1000),
            context_scale=(0, 1000), decoding_weight=(0, 1000), appearance=(0, 4096), learning_rate=(0, 1),
        )  # fmt: skip


class ContextInferenceEngine(nn.Module):
    """Belief (B, A + 1, H) over hidden rules, and the context (B, A + 1, D) that modulates the models.

    The recurrent state is carried openly: `initial_belief`, `step`, `sequence`. `engine(memory)` is the belief after a memory.

    Args:
        settings: see `ContextSettings`.
        actions: A.
        num_effects: K.
        codes: C, categories of a patch.
    """

    def __init__(self, settings: ContextSettings, actions: int, num_effects: int, codes: int) -> None:
        super().__init__()
        self.settings, self.actions, self.num_effects, self.codes = settings, actions, num_effects, codes
        hidden = settings.hidden
        self.own_effect = nn.Linear(num_effects, hidden)
        self.others_effect = nn.Linear(num_effects, hidden)
        self.world_event = nn.Linear(num_effects + 1 + settings.contact_features, hidden)
        self.contact_features = nn.Linear(2 * codes, settings.contact_features)
        self.gru = nn.GRU(hidden, hidden, batch_first=True)
        self.first = nn.Parameter(torch.zeros(2, hidden))  # the belief before any experience: of an action, of the world
        self.to_context = nn.Linear(hidden, settings.context)
        self.register_buffer("pairs", pair_codes(codes), persistent=False)
        with torch.no_grad():
            for layer in (self.own_effect, self.others_effect, self.world_event):
                layer.weight.mul_(settings.token_scale)
            self.to_context.weight.mul_(settings.context_scale)
            self.gru.bias_ih_l0[hidden : 2 * hidden] = 1.0  # update gate: remember by default

    # ----------------------------------------------------------------------------------------------- contract

    def initial_belief(self, batch: int) -> Tensor:
        """The belief before any experience: (batch, A + 1, H)."""
        rows = torch.cat([self.first[:1].expand(self.actions, -1), self.first[1:]])
        return rows.expand(batch, -1, -1)

    def context(self, belief: Tensor) -> Tensor:
        """The context (..., A + 1, D) of beliefs (..., A + 1, H): row a for action a, the last for the world."""
        return self.to_context(belief)

    def step(self, belief: Tensor, experience: Experience) -> Tensor:
        """The belief (B, A + 1, H) after one more step; `experience` has T = 1."""
        tokens, state = self._tokens(experience), belief.reshape(1, -1, belief.shape[-1])
        return self.gru(tokens.view(-1, 1, tokens.shape[-1]), state)[1].view(belief.shape)

    def sequence(self, experience: Experience) -> Tensor:
        """All beliefs of lifetimes from their beginning: (B, T + 1, A + 1, H); index t is the belief before step t."""
        B, T = experience.action.shape
        tokens = self._tokens(experience)  # (B, T, A + 1, H)
        rows, first = self.actions + 1, self.initial_belief(B)
        inputs = tokens.transpose(1, 2).reshape(B * rows, T, -1)
        beliefs, _ = self.gru(inputs, first.reshape(1, B * rows, -1))
        beliefs = beliefs.view(B, rows, T, -1).transpose(1, 2)
        return torch.cat([first[:, None], beliefs], 1)

    def forward(self, memory: EpisodicMemory) -> Tensor:
        """The belief (B, A + 1, H) after everything in `memory`."""
        return self.sequence(memory.experience())[:, -1]

    # ------------------------------------------------------------------------------------------------- parts

    def _tokens(self, experience: Experience) -> Tensor:
        """What every row of the belief reads: (B, T, A + 1, H)."""
        posterior = experience.posterior.float()
        mine = F.one_hot(experience.action, self.actions)[..., None].bool()  # (B, T, A, 1)
        effects = torch.where(mine, self.own_effect(posterior)[:, :, None], self.others_effect(posterior)[:, :, None])
        rewarded = experience.reward.nonzero(as_tuple=True)
        present = contact_pairs(experience.codes[rewarded], experience.next_codes[rewarded], self.codes)
        world = self._world_token(posterior, experience.reward, rewarded, present)
        return torch.cat([effects, world[:, :, None]], 2)

    def _world_token(self, posterior: Tensor, reward: Tensor, rewarded: tuple[Tensor, ...], present: Tensor) -> Tensor:
        """(..., H) from effects (..., K), rewards (...), and what contact_features what: which pairs of codes (n, C*C) occur where there is
        a reward, at the indices `rewarded`. It is signed by the reward, so that steps without one add nothing to the evidence
        about what is worth something."""
        features = F.silu(self.contact_features(self.pairs)).expand(*present.shape, -1)
        contact_features = features.masked_fill(~present[..., None], ABSENT).amax(-2)  # the highest over the pairs that occur
        signed = reward.new_zeros(*reward.shape, contact_features.shape[-1]).index_put(rewarded, reward[rewarded][:, None] * contact_features)
        return self.world_event(torch.cat([posterior, reward[..., None], signed], -1))

    # -------------------------------------------------------------------------------------------------- loss

    def loss(
        self, experience: Experience, transition: TransitionModel, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Learn to infer: predict the next outcome, and decode the whole lifetime from the belief at a random time.

            filter    = mean over (B, T) of  -sum_k q_t(k) log pi(k | a_t, c_t)
            hindsight = weight * mean over (B, T) of  -sum_k q_t(k) log pi(k | a_t, c_t'),   t' random, past or future
            reward, termination = cross-entropies of sampled steps under c_t', t' random; steps with an event (a reward
            or an end) and steps without are averaged apart, because events are 6% of the steps

        t' lies in the same segment as t: what another rule did is no target. Gradients reach the engine, the prior and
        the reward_and_termination; codes and effect posteriors are data.

        Args:
            experience: (B, T, ...).
            transition: its contextual parameters learn along.
            generator: of the random times.

        Returns:
            scalars by name, and the beliefs (B, T + 1, A + 1, H) without gradient.
        """
        B, T = experience.action.shape
        beliefs = self.sequence(experience)
        context = self.context(beliefs[:, :-1])  # (B, T, A + 1, D)
        action, posterior = experience.action.flatten(), experience.posterior.float().flatten(0, 1)
        row = torch.arange(B, device=action.device).repeat_interleave(T)
        elsewhen, same = self._other_times(experience.segment, row, generator)
        filtered = transition.prior_loss(context.flatten(0, 1), action, posterior)
        hindsight = transition.prior_loss(context[row, elsewhen], action, posterior)
        losses = {
            "filter": filtered.mean(),
            "decoding": self.settings.decoding_weight * (hindsight * same).sum() / same.sum(),
        }
        event = (experience.terminated | (experience.reward != 0)).flatten()
        for occurred in (True, False):
            steps = (event == occurred).nonzero()[:, 0]
            if len(steps) == 0:
                continue
            drawn = steps[torch.randint(len(steps), (B * T // 5,), generator=generator, device=steps.device)]
            at, valid = self._other_times(experience.segment, row[drawn], generator, drawn % T)
            present = contact_pairs(experience.codes.flatten(0, 1)[drawn], experience.next_codes.flatten(0, 1)[drawn], self.codes)
            terms = transition.reward_and_termination_loss(
                context[row[drawn], at, -1], present, experience.reward.flatten()[drawn], experience.terminated.flatten()[drawn]
            )  # fmt: skip
            for name, term in terms.items():
                losses[name] = losses.get(name, 0) + (term * valid).sum() / valid.sum().clamp_min(1)
        return losses, beliefs.detach()

    def _other_times(
        self, segment: Tensor, row: Tensor, generator: torch.Generator, step: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """A random time (N,) for each step of lifetimes `row` (N,), and whether it lies in the step's segment (float);
        without hindsight the step's own time."""
        T = segment.shape[1]
        if step is None:
            step = torch.arange(len(row), device=row.device) % T
        if self.settings.decoding_weight == 0:
            return step, torch.ones(len(row), device=row.device)
        elsewhen = torch.randint(T, row.shape, generator=generator, device=row.device)
        return elsewhen, (segment[row, elsewhen] == segment[row, step]).float()


class AppearanceEngine(nn.Module):
    """How everything looks in this lifetime: one more recurrent row, whose context modulates perception alone.

    Its token is the mean of features of the picture's patches. It stands apart from the belief about the rules because
    other evidence feeds it (pictures, not effects), because the VAE's bound teaches it, as in variBAD every part of a
    belief learns from what must be decoded with it.

    Args:
        settings: see `ContextSettings`; `appearance` above 0.
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
        """Look at pictures in the order in which they came.

        Args:
            patches: (B, T, S, P) float32, see `VAE.patches`.
            state: (1, B, H), what the pictures before them left behind; None at the beginning of a lifetime.

        Returns:
            contexts (B, T, D), each with its own picture already seen, and the state (1, B, H) behind the last one.
        """
        states, last = self.gru(F.silu(self.features(patches)).mean(2), state)
        return self.to_context(states), last

    def unseen(self) -> Tensor:
        """The context (D,) before any picture."""
        return self.to_context(torch.zeros(self.gru.hidden_size, device=self.to_context.weight.device))


def spread_over_rules(world: HiddenRulesWorld, by_case: Tensor) -> Tensor:
    """Cases (B, map, wind and edges, colour) spread over every rule (B, rules), a task's digits in their order."""
    return by_case[..., world.space.colours[:, 0].to(by_case.device)].transpose(1, 2).flatten(1)


def likelihood_by_case(world: HiddenRulesWorld, before: Tensor, action: Tensor, after: Tensor) -> Tensor:
    """Log probability of what a perfect eye saw happen: (B, map, wind and edges, colour) float32, by action map, wind and edges,
    and the body's colour, which is all of a rule that counts for it.

    Args:
        world: for its settings and walls; its rule is not read.
        before, after: (B, colour, 2) int64 positions by colour around the step, before any restart.
        action: (B,) int64.
    """
    s, space, device = world.settings, world.space, before.device
    wraps, wind, strength = (part.to(device) for part in (space.wraps, space.wind, space.strength))
    place = before[:, :, None, None].expand(-1, -1, len(wraps), len(MOVES), -1)
    landed = destination(place, MOVES.to(device), wraps[:, None], s.grid, world.walls)  # (B, colour, edges, move, 2)
    reached = (landed == after[:, :, None, None]).all(-1).float()
    probability = with_slips(s, reached)[:, :, None].expand(-1, -1, len(wind), -1, -1)  # (B, colour, wind, edges, move)
    if s.wind:
        gust = reached[..., wind].permute(0, 1, 3, 2)[..., None]  # (B, colour, wind, edges, 1)
        probability = torch.lerp(probability, gust, strength[:, None, None])
    moved = (before != after).any(-1)  # (B, colour)
    alone = moved.sum(1, keepdim=True) == moved.long()  # things never move
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
    """The exact posterior over all rules of a house world, for a perfect eye; privileged, for references and tests.

    It reads positions from the world, never the rule. `nll` lists, for each step, -log p(what was seen | the past)
    (B,), the bar for any belief.

    Args:
        world: the world it watches.
        switch: probability that the rule is drawn anew after a step; the world's own if not given.
        floor: the least likelihood of anything, so that a filter that expects no switch can still change its mind
            when one comes: without a floor the true rule would stay impossible for ever.
    """

    CHUNK = 1 << 22  # numbers; what fits into fast memory is several times as fast

    def __init__(self, world: HiddenRulesWorld, switch: float | None = None, floor: float = 0.0) -> None:
        self.world, self.floor = world, floor
        self.switch = world.settings.switch if switch is None else switch

    def reset(self, frames: Tensor) -> None:
        """Believe every rule alike: `log_posterior` (B, rules)."""
        rules = len(self.world.space)
        self.log_posterior = torch.full((len(frames), rules), -math.log(rules), device=frames.device)
        self.nll: list[Tensor] = []
        self.seen = self.world.order_by_colour(self.world.position)

    def observe(self, action: Tensor, step: WorldStep) -> None:
        """Bayes' rule on where everything went and on the reward; note how unexpected the former was."""
        arrived = self.world.order_by_colour(self.world.next_position, self.world.step_rule)
        least = math.log(self.floor) if self.floor else -math.inf
        by_case = likelihood_by_case(self.world, self.seen, action, arrived).clamp_min(least)
        rewarded = torch.where(reward_consistent(self.world, arrived, step.reward), 0.0, least)
        nll, posterior = [], []
        some = max(1, self.CHUNK // len(self.world.space))
        for kept, case, evidence in zip(self.log_posterior.split(some), by_case.split(some), rewarded.split(some)):
            joint = kept + spread_over_rules(self.world, case)
            nll.append(-joint.logsumexp(-1))
            joint = (joint.view(len(joint), -1, evidence.shape[1]) + evidence[:, None]).flatten(1).log_softmax(-1)
            if self.switch:
                joint = joint + math.log1p(-self.switch)
                joint = torch.logaddexp(joint, torch.full_like(joint, math.log(self.switch / joint.shape[1])))
            posterior.append(joint)
        self.nll.append(torch.cat(nll))
        self.log_posterior = torch.cat(posterior)
        self.seen = self.world.order_by_colour(self.world.position)


class ActionValues:
    """What moves are worth in a world whose rule is known, by value iteration.

        Q(s, m) = E[r + discount * V(s')],  where the end of an episode leads to W, the mean value of a reset_value start under the
        same edges and wind, because the lifetime goes on.

    The episode's time limit is left out: the picture does not show it. W is that over all places of the things, or over 1024
    random ones (and layouts of walls) where these are more than 4096; small worlds are solved once for all of them, larger
    ones anew for every question.

    Args:
        settings: of the world; discount: for each step; tolerance: largest change of a value in the last iteration.
        device: where the values live.
    """

    PLACES = 4096  # ways in which the things may lie that are all gone through
    TABLE = 1 << 23  # numbers in the largest table that is kept

    def __init__(
        self, settings: WorldSettings, discount: float = 0.95, tolerance: float = 1e-4, device: torch.device | str = "cpu"
    ) -> None:  # fmt: skip
        self.settings, self.discount, self.tolerance, self.device = settings, discount, tolerance, torch.device(device)
        self.space, self.reward_values = rule_space_of(settings), torch.tensor(settings.reward_values, dtype=torch.float32, device=device)
        cells, things = settings.grid**2, len(settings.reward_values)
        weathers = len(self.space.wind) * len(self.space.wraps)
        self.places = torch.stack(torch.meshgrid(*[torch.arange(settings.grid, device=device)] * 2, indexing="ij"), -1).view(-1, 2)
        self.table: Tensor | None = None
        few = cells**things <= self.PLACES and not settings.walls
        if few:
            at = torch.cartesian_prod(*[torch.arange(cells)] * things).view(-1, things).to(device)
        else:
            sample = HiddenRulesWorld(settings, 1024, torch.zeros(1, dtype=torch.int64), seed=0, device=device)
            sample.reset()
            at = self._cell(sample.position[:, 1:])
        walls = None if few else sample.walls
        reset_value, solved = [], []
        for weather in range(weathers):
            rule = self.space.rule(torch.full((len(at),), weather * self.space.pairs, device=device))
            q, value = self._iterate(at, rule, walls, None)
            reset_value.append(value), solved.append(q)
        self.reset_value = torch.stack(reset_value)  # (weather,)
        if few and weathers * cells ** (things + 1) * len(MOVES) <= self.TABLE:
            self.table = torch.stack(solved)  # (weather, places of the things, S, move)

    def __call__(self, world: HiddenRulesWorld, task: Tensor, position: Tensor) -> Tensor:
        """Q (B, move) float32 of worlds if tasks (B,) were true and things lay at `position` (B, role, 2)."""
        cell = self._cell(position)
        weather, rows = task // self.space.pairs, torch.arange(len(task), device=self.device)
        if self.table is None:
            q, _ = self._iterate(cell[:, 1:], self.space.rule(task), world.walls, self.reset_value[weather])
            return q[rows, cell[:, 0]]
        which = torch.zeros_like(weather)
        for thing in cell[:, 1:].unbind(1):
            which = which * self.settings.grid**2 + thing
        return self.table[weather, which, cell[:, 0]]

    def _cell(self, place: Tensor) -> Tensor:
        """Numbers (...) of the cells at (row, column) `place` (..., 2)."""
        return place[..., 0] * self.settings.grid + place[..., 1]

    def _iterate(self, at: Tensor, rule: Rule, walls: Tensor | None, reset_value: Tensor | None) -> tuple[Tensor, Tensor]:
        """Q (n, S, move) where things lie in cells `at` (n, thing), and W; found along the way if `reset_value` (n,) is not given."""
        s, n, cells = self.settings, len(at), len(self.places)
        place, move = self.places[None, :, None], MOVES.to(self.device)[None, None]
        to = destination(place.expand(n, -1, len(MOVES), -1), move, rule.wraps[:, None, None], s.grid, walls)
        to = self._cell(to).flatten(1)  # (n, S * move)
        worth = torch.zeros(n, cells, device=self.device).scatter_(1, at, self.reward_values.expand(n, -1))
        thing = torch.zeros(n, cells, dtype=torch.bool, device=self.device).scatter_(1, at, True)
        start = ~thing if walls is None else ~thing & ~walls.flatten(1)
        start &= (at.sort(1).values.diff(dim=1) != 0).all(1)[:, None]  # two things in one cell are no world
        mean, strength, known = reset_value, rule.strength[:, None], reset_value is not None
        moves = DIRECTIONS if s.actions == DIRECTIONS else len(MOVES)
        value = torch.zeros(n, cells, device=self.device)
        for _ in range(math.ceil(math.log(self.tolerance) / math.log(self.discount))):
            mean = reset_value if known else value.T[start.T].mean().expand(n)
            landed = torch.where(thing, worth + self.discount * mean[:, None], self.discount * value)
            by_move = landed.gather(1, to).view(n, cells, len(MOVES))
            q = with_slips(s, by_move)
            if s.wind:
                gust = by_move.gather(2, rule.wind[:, None, None].expand(-1, cells, -1))
                q = torch.lerp(q, gust, strength[..., None])
            change, value = (q[..., :moves].amax(-1) - value).abs().max(), q[..., :moves].amax(-1)
            if change < self.tolerance:
                break
        return q, mean[0]


class KnownRuleAgent:
    """The planner that knows the hidden rule: the top of the scale. Privileged, as are all agents that take a world.

    Args:
        world: the world it acts in, which it may read.
        q: what moves are worth in such worlds.
    """

    def __init__(self, world: HiddenRulesWorld, q: ActionValues) -> None:
        self.world, self.q = world, q

    def reset(self, frames: Tensor) -> None:
        """Nothing to remove_stale."""

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
        position = order_by_role(self.world.order_by_colour(self.world.position), rule)
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
        self.generator = make_generator(seed, stream=3, device=world.device)

    def reset(self, frames: Tensor) -> None:
        """Draw the first assumption from the prior."""
        self.filter.reset(frames)
        self.assumed = self._sample()

    def observe(self, action: Tensor, step: WorldStep) -> None:
        """Update the posterior, and draw again."""
        self.filter.observe(action, step)
        self.assumed = self._sample()

    def assumed_task(self) -> Tensor:
        """The tasks (B,) int64 drawn last."""
        return self.assumed

    def _sample(self) -> Tensor:
        return self.sample_task(self.filter.log_posterior)

    def sample_task(self, log_posterior: Tensor) -> Tensor:
        """One task (n,) int64 of each of the log posteriors (n, rules): wind and edges first, then the rest, because to draw
        among few is much cheaper than among all."""
        by_weather = log_posterior.unflatten(1, (-1, self.world.space.pairs))
        weather = torch.zeros(len(by_weather), 1, dtype=torch.int64, device=by_weather.device)
        if by_weather.shape[1] > 1:
            weather = torch.multinomial(by_weather.logsumexp(2).exp(), 1, generator=self.generator)
        pairs = by_weather.take_along_dim(weather[..., None], 1)[:, 0]
        pair = torch.multinomial(pairs.exp(), 1, generator=self.generator)
        return (weather * self.world.space.pairs + pair)[:, 0]
