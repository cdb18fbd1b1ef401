"""The transition model: which effects exist, which one an action will have in this task, and what follows from it.

*Effects* p(z'|z, k), k = 1..K, depend on neither action nor context. They are the changes of the code grid that can
occur in any task ("the red object moves left"). The *effect posterior* q(k|z, z') identifies which one did occur.
The rest is FiLM-modulated by the context, which stands for the task: the *prior* pi(k|a, c) of the effects; the *reward
and termination heads*, which read the *contact features*, that is, which pairs (code before, code after) occur at some
patch; and the *value*.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from film_layer import FiLMLayer
from memory import Experience, require_all

ABSENT = -1e4  # stands for minus infinity in a masked maximum, without NaN gradients


@dataclass(frozen=True)
class TransitionSettings:
    """Effects, their prior, reward and termination."""

    num_effects: int = 24  # number K of effects, which all tasks share, 2 to 255
    width: int = 24  # channels of the effect network, at least 1
    kernel: int = 3  # side of the effect network's convolutions in patches, odd
    # beyond the grid's edge the effect network sees zeros or, if circular, the opposite side, and then edges are marked
    # in its input; empty: circular if edges may wrap, else zeros
    padding: Literal["", "zeros", "circular"] = ""
    prior_width: int = 64  # hidden features of the prior, at least 1
    contact_width: int = 16  # features of a pair (code before, code after), at least 1
    reward_bins: tuple[float, ...] = (-1.0, 0.0, 1.0)  # rewards that the environment gives, at least two, increasing
    film_scale: float = 3.0  # initial FiLM weights over PyTorch's: one experience must visibly change predictions
    warmup_updates: int = 300  # first effect updates, whose labels ignore the rest of the lifetime
    annealed_updates: int = 200  # effect updates after those, in which the likelihood's exponent in labels rises to 1
    split_every: int = 25  # effect updates between split moves, from a third of the warm-up to the last annealed update
    learning_rate: float = 6e-3  # Adam's initial learning rate of the effects, in [0, 1]; it decays with the run

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("warmup_updates", "annealed_updates"), (0, 10**9))
        widths = dict.fromkeys(("width", "prior_width", "contact_width"), (1, 4096))
        require_all("transition", self, num_effects=(2, 255), kernel=(1, 31), film_scale=(0, 100), learning_rate=(0, 1))
        require_all("transition", self, **widths, **counts, split_every=(1, 10**9))
        if self.kernel % 2 == 0:
            raise ValueError(f"transition.kernel is {self.kernel}, but must be odd: choose {self.kernel + 1}.")
        if self.padding not in ("", "zeros", "circular"):
            raise ValueError(f"transition.padding is {self.padding!r}: choose zeros, circular, or leave it empty.")
        if len(self.reward_bins) < 2 or any(a >= b for a, b in pairwise(self.reward_bins)):
            raise ValueError(f"transition.reward_bins is {self.reward_bins}: give at least two increasing numbers.")

    def likelihood_exponent(self, update: int) -> float:
        """Exponent of the likelihood in the labels of effect update `update`: 0 in the warm-up, then .1 to 1."""
        if update < self.warmup_updates:
            return 0.0
        done = (update - self.warmup_updates) / max(1, self.annealed_updates)
        return min(1.0, 0.1 + 0.9 * done)

    def splits_at(self, update: int) -> bool:
        """Whether effect update number `update` begins with a split move, see `EffectNetwork.split`."""
        possible = self.warmup_updates // 3 <= update < self.warmup_updates + self.annealed_updates
        return possible and update % self.split_every == 0


def contact_pairs(codes: Tensor, next_codes: Tensor, n_codes: int) -> Tensor:
    """Which pairs (code before, code after) occur at some patch: (..., n_codes**2) bool, of codes (..., S) uint8."""
    pair = codes.long() * n_codes + next_codes.long()
    absent = torch.zeros(*pair.shape[:-1], n_codes**2, dtype=torch.bool, device=codes.device)
    return absent.scatter_(-1, pair, True)


def pair_codes(n_codes: int) -> Tensor:
    """One-hot descriptions of all pairs (code before, code after): (n_codes**2, 2 * n_codes) float32."""
    eye = torch.eye(n_codes)
    return torch.cat([eye.repeat_interleave(n_codes, 0), eye.repeat(n_codes, 1)], 1)


def one_hot(codes: Tensor, n_codes: int) -> Tensor:
    """(..., n_codes) float32 of codes (...) uint8; a lookup is faster than `F.one_hot`, which returns int64."""
    rows = torch.eye(n_codes, device=codes.device).index_select(0, codes.flatten().long())
    return rows.view(*codes.shape, n_codes)


def merge_equal(mass: Tensor, first: Tensor) -> Tensor:
    """Sum probabilities (B, n, K) of effects with equal grids into the `first` (B, K), see `EffectNetwork.predict`."""
    return torch.zeros_like(mass).scatter_add_(2, first[:, None].expand_as(mass), mass)


def top_p_filter(probability: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Mask (..., n) of the fewest entries that together have at least `top_p`, and their probabilities renormalised."""
    ordered, index = probability.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = torch.zeros_like(probability, dtype=torch.bool).scatter_(-1, index, (before < top_p) & (ordered > 0))
    weight = probability * kept
    return kept, weight / weight.sum(-1, keepdim=True)


def entropy(probability: Tensor) -> Tensor:
    """Entropy (...) in nats of distributions (..., n)."""
    return -(probability * probability.clamp_min(math.exp(-30)).log()).sum(-1)


class EffectNetwork(nn.Module):
    """The effects p(z'|z, k): a categorical for every patch, by two convolutions over the grid of codes.

    A learned multiple of the present code is added to the logits, so that initially every effect most likely leaves
    the grid as it is. For the arguments see `TransitionModel`.

    Raises:
        ValueError: a circular kernel that would reach around the whole grid.
    """

    def __init__(self, settings: TransitionSettings, codes: int, grid: tuple[int, int]) -> None:
        super().__init__()
        kernel, width, K = settings.kernel, settings.width, settings.num_effects
        self.codes, self.grid, self.num_effects = codes, grid, K
        padding = settings.padding or "zeros"
        if padding == "circular" and kernel > 2 * min(grid) + 1:
            limit = f"in a grid of {grid[0]}x{grid[1]} whose edges wrap it may be at most {2 * min(grid) + 1}"
            raise ValueError(f"transition.kernel is {kernel}, but {limit}.")
        convolution = {"kernel_size": kernel, "padding": kernel // 2, "padding_mode": padding}
        # Top, bottom, left and right edge as input channels: with circular padding they could not be seen otherwise.
        edges = torch.zeros(4, *grid)
        edges[0, 0], edges[1, -1], edges[2, :, 0], edges[3, :, -1] = 1, 1, 1, 1
        self.register_buffer("edges", edges[: 4 if padding == "circular" else 0], persistent=False)
        layers = []
        for channels in (codes + len(self.edges), width):
            layers += [nn.Conv2d(channels, width, **convolution), nn.GroupNorm(1, width), nn.SiLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(width, K * codes)
        self.stay = nn.Parameter(torch.tensor(4.0))  # added to the logit of the present code
        self.marginal = nn.Parameter(torch.zeros(K))  # logits of p0(k), the context-free prior
        bits = torch.randint(2**62, (grid[0] * grid[1],), generator=torch.Generator().manual_seed(0))
        self.register_buffer("fingerprint", bits, persistent=False)

    def hidden(self, codes: Tensor) -> Tensor:
        """Features (B, S, width) of one-hot code grids (B, S, C)."""
        grids = codes.view(-1, *self.grid, self.codes).permute(0, 3, 1, 2)  # (B, C, rows, columns)
        if len(self.edges):
            grids = torch.cat([grids, self.edges.expand(len(grids), -1, -1, -1)], 1)
        return self.features(grids).flatten(2).transpose(1, 2)  # (B, S, width)

    def _logits(self, codes: Tensor, codes_first: bool) -> Tensor:
        """Logits of every code at every patch under every effect, in one of two memory layouts.

        (B, S, K, C) makes the argmax over the codes faster; (B, S, C, K), with `codes_first`, halves the time of the
        log-softmax over the codes. Only the rows of the head are reordered, not the result.
        """
        weight = self.head.weight.view(self.num_effects, self.codes, -1)  # (K, C, width)
        bias = self.head.bias.view(self.num_effects, self.codes)
        stay = (self.stay * torch.eye(self.codes, device=codes.device)).expand(self.num_effects, -1, -1)
        weight = torch.cat([weight, stay], -1)  # (K, C, width + C): the one-hot present code is an input of the head
        if codes_first:
            weight, bias = weight.transpose(0, 1), bias.t()
        present = one_hot(codes, self.codes)
        features = torch.cat([self.hidden(present), present], -1)  # (B, S, width + C)
        return F.linear(features, weight.flatten(0, 1), bias.flatten()).view(*codes.shape, *bias.shape)

    def log_likelihood(self, codes: Tensor, next_codes: Tensor) -> Tensor:
        """log p(z'|z, k) (B, K) in nats, summed over patches, of code grids (B, S) uint8."""
        log_p = self._logits(codes, codes_first=True).log_softmax(2)  # (B, S, C, K)
        index = next_codes.long()[:, :, None, None].expand(-1, -1, 1, self.num_effects)
        return log_p.gather(2, index)[:, :, 0].sum(1)

    @torch.no_grad()
    def predict(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """The most likely next grids (B, K, S) uint8 under every effect, of code grids (B, S) uint8.

        Also the first effect that leads to the same grid as each effect: (B, K) int64.
        """
        grids = self._logits(codes, codes_first=False).argmax(-1).transpose(1, 2)  # (B, K, S)
        key = self.key(grids)
        same = key[:, :, None] == key[:, None]  # (B, K, K)
        return grids.to(torch.uint8), same.byte().argmax(-1)

    def key(self, codes: Tensor) -> Tensor:
        """A hash (...) int64 of each grid (..., S), by 62 random bits per patch: equal keys mean equal grids."""
        return (codes * self.fingerprint).sum(-1)

    @torch.no_grad()
    def split(self, codes: Tensor, next_codes: Tensor, generator: torch.Generator, min_cost: float = 0.2) -> bool:
        """Split an effect that stands for two: a disturbed copy of it replaces the effect that is needed least.

        A mixture trained by gradient descent can end with one component for two effects and several components for
        another, which the labels of a lifetime cannot undo later. The remedy is a split move (Ueda et al., "SMEM
        Algorithm for Mixture Models", 2000): if the steps that effect k explains cost more than `min_cost` each, the
        effect whose removal costs least becomes a copy of k plus noise, and the next updates separate the two.

        `codes` and `next_codes` (N, S) uint8 are a sample of steps, `generator` makes the noise, `min_cost` is a mean
        negative log-likelihood in nats per step. Returns whether an effect was split.
        """
        log_marginal = self.marginal.log_softmax(0)
        joint = self.log_likelihood(codes, next_codes) + log_marginal
        label = joint.softmax(-1)  # (N, K)
        usage = label.mean(0)
        cost = (label * -(joint - log_marginal)).mean(0) / usage.clamp_min(1e-6)  # nats per step that k explains
        removal_cost = -torch.log1p(-label.clamp_max(1 - 1e-6)).mean(0)  # what the mixture would lose, nats per step
        worst = (cost.masked_fill(usage < 0.01, 0) * usage).argmax()
        spare = removal_cost.index_fill(0, worst, torch.inf).argmin()
        if cost[worst] < min_cost or removal_cost[spare] > 0.1:
            return False
        for parameter in (self.head.weight, self.head.bias):
            rows = parameter.view(self.num_effects, self.codes, -1)
            noise = torch.randn(rows[worst].shape, generator=generator, device=rows.device)
            rows[spare] = rows[worst] + 0.1 * rows[worst].std() * noise
        self.marginal[worst] -= math.log(2)
        self.marginal[spare] = self.marginal[worst]
        return True


class EffectCache:
    """A direct-mapped cache of `EffectNetwork.predict`: same arguments, same results, each grid computed once.

    Every grid has exactly one slot where it can be stored; a new grid replaces the one that was there.

    The network must not change while the cache is in use. `slots` is the largest number of grids, reduced so that they
    take at most 64 MiB. That memory is uninitialized, so a CPU commits only what is used.
    """

    def __init__(self, network: EffectNetwork, slots: int = 1 << 15) -> None:
        device, K, S = network.fingerprint.device, network.num_effects, len(network.fingerprint)
        slots = min(slots, (64 << 20) // (K * (S + 8)))
        self.network = network
        self.keys = torch.full((slots,), -1, device=device)  # of the grid in each slot
        self.grids = torch.empty((slots, K, S), dtype=torch.uint8, device=device)
        self.first = torch.empty((slots, K), dtype=torch.int64, device=device)

    def __call__(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """See `EffectNetwork.predict`."""
        key = self.network.key(codes)
        slot = key % len(self.keys)
        grids, first = self.grids.index_select(0, slot), self.first.index_select(0, slot)
        missing = (self.keys[slot] != key).nonzero()[:, 0]
        if len(missing):
            grids[missing], first[missing] = self.network.predict(codes[missing])
            self.keys[slot[missing]] = key[missing]
            # If several grids of this batch share a slot, store the one whose key it has now.
            stored = missing[self.keys[slot[missing]] == key[missing]]
            self.grids[slot[stored]], self.first[slot[stored]] = grids[stored], first[stored]
        return grids, first


class TransitionModel(nn.Module):
    """Effects and their posterior; prior, reward and termination, which are FiLM-modulated.

    A context has one row for each of the A actions and a last one, the world row, see context_engine.py.

    Args:
        settings: see `TransitionSettings`.
        codes: number of codes C.
        grid: (rows, columns) of patches; S = rows * columns.
        context_dim: size D of one row of the context.
    """

    def __init__(self, settings: TransitionSettings, codes: int, grid: tuple[int, int], context_dim: int) -> None:
        super().__init__()
        width, pair, K = settings.prior_width, settings.contact_width, settings.num_effects
        self.settings, self.codes = settings, codes
        self.effects = EffectNetwork(settings, codes, grid)
        self.action_features = nn.Parameter(torch.randn(1, 1, width))
        self.prior_film = FiLMLayer(context_dim, width, settings.film_scale)
        self.prior_out = nn.Sequential(
            nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, K)
        )
        self.contact_in = nn.Sequential(nn.Linear(2 * codes, pair), nn.SiLU(), nn.Linear(pair, pair))
        self.contact_film = FiLMLayer(context_dim, pair, settings.film_scale)
        self.contact_out = nn.Linear(pair, len(settings.reward_bins) + 1)
        self.register_buffer("reward_bins", torch.tensor(settings.reward_bins), persistent=False)
        self.register_buffer("pairs", pair_codes(codes), persistent=False)

    def contextual_parameters(self) -> list[nn.Parameter]:
        """The parameters that are trained with the context engine: all but the effect network's."""
        return [p for name, p in self.named_parameters() if not name.startswith("effects.")]

    def effect_posterior(self, likelihood: Tensor) -> Tensor:
        """q(k|z, z') (B, K) of log p(z'|z, k) (B, K), under the context-free prior: no belief biases the labels."""
        return (likelihood + self.effects.marginal.log_softmax(0)).softmax(-1)

    def nll(self, likelihood: Tensor, action: Tensor, context: Tensor) -> Tensor:
        """-log sum_k pi(k|a, c) p(z'|z, k) (B,), nats, of log p(z'|z, k) (B, K), actions (B,), contexts (B, A+1, D)."""
        return -(self._chosen_prior(context, action) + likelihood).logsumexp(-1)

    def log_prior(self, context: Tensor) -> Tensor:
        """log pi(k|a, c) (B, A, K) of contexts (B, A, D), one row for each action in question."""
        features = self.prior_film(self.action_features.expand(*context.shape[:2], -1), context)
        return self.prior_out(features).log_softmax(-1)

    def reward_and_termination(
        self, present: Tensor, context: Tensor, row: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Reward and termination from the contact features.

        `present` (N, C*C) bool comes from `contact_pairs`, `context` (B, D) is the world row of the context, and
        `row` (N,) int64 the index of each one's context, so that shared contexts are computed once; without it N = B.
        Returns log p(r) (N, bins) over `reward_bins`, and the logit (N,) of the episode's termination.
        """
        occurs = present.any(0)  # compute only pairs that occur in the batch, about a third of all
        occurs[0] = True  # at least one, because the maximum over none is undefined
        occurring = occurs.nonzero()[:, 0]
        features = self.contact_in(self.pairs[occurring]).expand(len(context), -1, -1)
        features = F.silu(self.contact_film(features, context))  # (B, occurring, contact_width)
        if row is not None:
            features = features.index_select(0, row)
        out = self.contact_out(features.masked_fill_(~present[:, occurring, None], ABSENT).amax(-2))  # (N, bins + 1)
        return out[..., :-1].log_softmax(-1), out[..., -1]

    def two_hot(self, reward: Tensor) -> Tensor:
        """Rewards (N,) as weights (N, bins) of the two nearest bins, whose weighted mean they are (DreamerV3, Hafner
        et al., 2023). Rewards beyond the outer bins count as those."""
        bins, reward = self.reward_bins, reward.clamp(self.reward_bins[0], self.reward_bins[-1])
        above = torch.searchsorted(bins, reward).clamp_min(1)
        share = (reward - bins[above - 1]) / (bins[above] - bins[above - 1])
        low, high = F.one_hot(above - 1, len(bins)), F.one_hot(above, len(bins))
        return low * (1 - share[:, None]) + high * share[:, None]

    def effect_loss(self, experience: Experience, n_actions: int, likelihood_exponent: float) -> dict[str, Tensor]:
        """Learn which effects exist; in nats per step, mean over (B, T) steps.

        By `likelihood_exponent` (exponent) there are three phases, where marginal = -log sum_k p0(k) p(z'|z, k):

            warm-up, 0:         L = marginal
            annealed, below 1:  L = -sum_k q(k) log p(z'|z, k) + 0.1 * marginal,  q(k) ~ p(z'|z, k)^exponent pi(k|a)
            final, 1:           L = -log sum_k pi(k|a) p(z'|z, k) + 0.1 * marginal

        pi is the leave-one-out prior of the lifetime. Within one task an action has one effect, so the *other* uses of
        the same action in the lifetime say how this one should be labelled:

            pi(k|a_t) = (p0(k) + sum_{s != t, a_s = a_t} q_s(k)) / (1 + n_a - 1)

        It is iterated twice, with gradients stopped, over steps of `experience` (B, T, ...) with equal row, segment and
        action; `n_actions` is A. Without it, the meaning of an effect varies from grid to grid. With it from the first
        update, all moves of a colour collapse into one effect. Without annealing, wrong labels persist.
        """
        B, T = experience.action.shape
        likelihood = self.effects.log_likelihood(experience.codes.flatten(0, 1), experience.next_codes.flatten(0, 1))
        marginal = -(likelihood + self.effects.marginal.log_softmax(0)).logsumexp(-1).mean()
        if likelihood_exponent == 0:
            return {"marginal": marginal}
        log_prior = self._lifetime_prior(likelihood.detach().view(B, T, -1), experience, n_actions).flatten(0, 1)
        if likelihood_exponent < 1:
            label = (likelihood_exponent * likelihood.detach() + log_prior).softmax(-1)  # (B * T, K)
            consistent = -(label * likelihood).sum(-1).mean()
        else:
            consistent = -(likelihood + log_prior).logsumexp(-1).mean()
        return {"consistent": consistent, "marginal": 0.1 * marginal}

    @torch.no_grad()
    def _lifetime_prior(self, likelihood: Tensor, experience: Experience, n_actions: int) -> Tensor:
        """log pi(k|a_t) (B, T, K), see `effect_loss`, of log p(z'|z, k) (B, T, K)."""
        marginal = self.effects.marginal.softmax(0)
        group = experience.segment.long() * n_actions + experience.action  # (B, T)
        member = F.one_hot(group).float()  # (B, T, groups)
        others = member.sum(1).gather(1, group)[..., None] - 1  # n_a - 1
        prior = marginal.expand_as(likelihood)
        for _ in range(2):
            q = (likelihood + prior.log()).softmax(-1)
            totals = member.transpose(1, 2) @ q  # (B, groups, K)
            same = totals.gather(1, group[..., None].expand_as(q)) - q  # leave one out
            prior = ((marginal + same) / (1 + others)).clamp_min(1e-6)
        return prior.log()

    def prior_loss(self, context: Tensor, action: Tensor, posterior: Tensor) -> Tensor:
        """-sum_k q(k) log pi(k|a, c) (N,), nats, of posteriors q (N, K), actions (N,) and contexts (N, A + 1, D)."""
        return -(posterior * self._chosen_prior(context, action)).sum(-1)

    def _chosen_prior(self, context: Tensor, action: Tensor) -> Tensor:
        """log pi(k|a, c) (N, K) of one action (N,) under each context (N, A + 1, D)."""
        chosen = context.gather(1, action[:, None, None].expand(-1, 1, context.shape[-1]))  # (N, 1, D)
        return self.log_prior(chosen)[:, 0]

    def reward_and_termination_loss(
        self, context: Tensor, present: Tensor, reward: Tensor, terminated: Tensor
    ) -> dict[str, Tensor]:
        """Cross-entropies (N,) in nats of rewards (N,), as `two_hot`, and terminations (N,) bool; see
        `reward_and_termination` for the contexts (N, D) and `present` (N, C*C)."""
        log_reward, end = self.reward_and_termination(present, context)
        return {
            "reward": -(self.two_hot(reward) * log_reward).sum(-1),
            "termination": F.binary_cross_entropy_with_logits(end, terminated.float(), reduction="none"),
        }


class Value(nn.Module):
    """The value V(z, c) of a state under a belief, and W(c), the value of starting a new episode; in units of reward.

    It depends on the belief as well as the state, so an action that yields information has a value of its own. The
    state enters through keypoints, as in the spatial softmax of Finn et al. (2016), with one change: attention is over
    the *codes* that are present, each at its mean position, and not over single patches. So the background, one code on
    most patches, does not outweigh the few objects, and the value starts to learn earlier. The rows of the actions
    enter through their mean, so relabelling the actions changes nothing.

    Args:
        codes, grid, context_dim: as in `TransitionModel`.
        keypoints: number of keypoints P.
        width: hidden features.
    """

    POOLED = 64  # features of the actions' rows, and as many of the world row

    def __init__(self, codes: int, grid: tuple[int, int], context_dim: int, keypoints: int, width: int) -> None:
        super().__init__()
        self.codes, pooled = codes, 2 * self.POOLED
        self.action_in = nn.Linear(context_dim, self.POOLED)
        self.world_in = nn.Linear(context_dim, self.POOLED)
        self.code_features = nn.Parameter(torch.randn(1, codes, 32) * 0.5)
        self.code_film = FiLMLayer(pooled, 32)
        self.code_out = nn.Linear(32, 2 * keypoints)
        self.state_in = nn.Linear(4 * keypoints, width)
        self.state_norm = nn.LayerNorm(width)
        self.state_film = FiLMLayer(pooled, width)
        self.state_hidden = nn.Linear(width, width)
        self.state_out = nn.Linear(width, 1)
        self.reset_out = nn.Sequential(nn.Linear(pooled, 128), nn.SiLU(), nn.Linear(128, 1))
        nn.init.zeros_(self.state_out.weight)
        nn.init.zeros_(self.reset_out[-1].weight)
        axes = [torch.linspace(-1, 1, n) for n in grid]
        place = torch.stack([torch.ones(grid), *torch.meshgrid(*axes, indexing="ij")], -1).view(-1, 3)
        self.register_buffer("place", place, persistent=False)  # (S, (one, y, x))

    def statistics(self, codes: Tensor) -> Tensor:
        """Share of the patches and mean position (y, x) in -1..1 of every code: (B, C, 3) float32, of (B, S) uint8."""
        sums = one_hot(codes, self.codes).transpose(1, 2) @ self.place
        return torch.cat([sums[..., :1] / len(self.place), sums[..., 1:] / sums[..., :1].clamp_min(1)], -1)

    def pool(self, context: Tensor) -> Tensor:
        """What the value reads of contexts (B, A + 1, D): (B, 128)."""
        actions = F.silu(self.action_in(context[:, :-1])).mean(1)
        return torch.cat([actions, F.silu(self.world_in(context[:, -1]))], -1)

    def forward(self, statistics: Tensor, pooled: Tensor, row: Tensor | None = None) -> Tensor:
        """V (B,) of states by `statistics` (B, C, 3) under pooled contexts (B, 128).

        With `row` (B,) int64, state i is evaluated under pooled[row[i]], so that shared contexts are computed once.
        """
        code_out = self.code_out(F.silu(self.code_film(self.code_features.expand(len(pooled), -1, -1), pooled)))
        if row is not None:
            code_out = code_out.index_select(0, row)
        key, value = code_out.chunk(2, -1)  # (B, C, P) each
        share, centre = statistics[..., :1], statistics[..., 1:]
        masked = key.masked_fill(share == 0, ABSENT)
        weight = (4 * masked).softmax(1)  # attention over the codes that are present
        points = weight.transpose(1, 2) @ centre  # (B, P, 2)
        state = torch.cat([points.flatten(1), masked.amax(1), (weight * value).sum(1)], -1)  # (B, 4 * P)
        state = F.silu(self.state_film(self.state_norm(self.state_in(state)), pooled, row))
        state = state + F.silu(self.state_hidden(state))
        return self.state_out(state)[:, 0]

    def reset_value(self, pooled: Tensor) -> Tensor:
        """W (B,), the value of starting an episode under pooled contexts (B, 128)."""
        return self.reset_out(pooled)[:, 0]
