"""The transition model: what can happen (num_effects), what will happen in this task (prior), and what it is worth.

*Outcomes* p(z'|z, k), k = 1..K, know neither action nor context: they are what can happen anywhere ("the red thing
moves left"). The *prior* pi(k|a, c) and the *reward_and_termination* (reward and end of the episode) are FiLM-modulated: they say
what will happen under the rules that the context stands for. The *effect posterior* q(k|z, z') names what did happen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from film_layer import FiLMLayer
from memory import Experience, require_all


ABSENT = -1e4  # stands for minus infinity in a masked maximum, without NaN gradients


@dataclass(frozen=True)
class TransitionSettings:
    """Outcomes, their prior, reward and end of the episode."""

    num_effects: int = 24
    """Number K of universal num_effects, 2 to 255."""
    width: int = 24
    """Channels of the outcome network, at least 1."""
    kernel: int = 3
    """Side of the outcome network's convolutions in patches; odd."""
    padding: Literal["", "zeros", "circular"] = ""
    """What the outcome network sees beyond the edge: zeros, or circular the other side and where the edges are; empty: circular
    where edges may wrap."""
    prior_width: int = 64
    """Hidden features of the prior, at least 1."""
    contact_width: int = 16
    """Features of a pair (code before, code after), at least 1."""
    reward_bins: tuple[float, ...] = (-1.0, 0.0, 1.0)
    """The rewards that the world gives, increasing."""
    film_scale: float = 3.0
    """Initial scale of the FiLM generators over PyTorch's default: one experience must move the prediction visibly."""
    warmup_updates: int = 300
    """Outcome updates without any consistency over the lifetime."""
    annealed_updates: int = 200
    """Outcome updates after those, in which labels may move to where their lifetime says they belong."""
    split_every: int = 25
    """Outcome updates between split moves, from a third of the free updates to the last tempered one, at least 1."""
    learning_rate: float = 6e-3
    """Adam's, of the num_effects; it decays with the run."""

    def __post_init__(self) -> None:
        require_all(
            "transition", self, num_effects=(2, 255), width=(1, 4096), kernel=(1, 31), prior_width=(1, 4096), contact_width=(1, 4096),
            film_scale=(0, 100), warmup_updates=(0, 10**9), annealed_updates=(0, 10**9), split_every=(1, 10**9),
            learning_rate=(0, 1),
        )  # fmt: skip
        if self.kernel % 2 == 0:
            raise ValueError(f"transition.kernel is {self.kernel}, but must be odd: choose {self.kernel + 1}.")
        if self.padding not in ("", "zeros", "circular"):
            raise ValueError(f"transition.padding is {self.padding!r}: choose zeros or circular.")
        if len(self.reward_bins) < 2 or any(a >= b for a, b in zip(self.reward_bins, self.reward_bins[1:])):
            raise ValueError(f"transition.reward_bins is {self.reward_bins}, but needs at least two increasing numbers.")

    def likelihood_exponent(self, update: int) -> float:
        """Exponent of the likelihood in the label of outcome update number `update`: 0 free, 1 exact (see the loss)."""
        if update < self.warmup_updates:
            return 0.0
        done = (update - self.warmup_updates) / max(1, self.annealed_updates)
        return min(1.0, 0.1 + 0.9 * done)

    def splits_at(self, update: int) -> bool:
        """Whether outcome update number `update` begins with a split move."""
        possible = self.warmup_updates // 3 <= update < self.warmup_updates + self.annealed_updates
        return possible and update % self.split_every == 0


def contact_pairs(codes: Tensor, next_codes: Tensor, n_codes: int) -> Tensor:
    """Which pairs (code before, code after) occur at some patch: (..., n_codes**2) bool, of codes (..., S) uint8."""
    pair = codes.long() * n_codes + next_codes.long()
    absent = torch.zeros(*pair.shape[:-1], n_codes**2, dtype=torch.bool, device=codes.device)
    return absent.scatter_(-1, pair, True)


def one_hot(codes: Tensor, n_codes: int) -> Tensor:
    """(..., n_codes) float32 of codes (...) uint8: a look-up, because torch's own goes through int64."""
    rows = torch.eye(n_codes, device=codes.device).index_select(0, codes.flatten().long())
    return rows.view(*codes.shape, n_codes)


def pair_codes(n_codes: int) -> Tensor:
    """One-hot description of every pair: (n_codes**2, 2 * n_codes) float32, before then after."""
    eye = torch.eye(n_codes)
    return torch.cat([eye.repeat_interleave(n_codes, 0), eye.repeat(n_codes, 1)], 1)


def merge_equal(mass: Tensor, first: Tensor) -> Tensor:
    """The mass (B, n, K) of num_effects that look alike, all of it on the first of them (B, K), see `EffectNetwork.predict`."""
    return torch.zeros_like(mass).scatter_add_(2, first[:, None].expand_as(mass), mass)


class EffectNetwork(nn.Module):
    """The universal num_effects: cell-wise categorical p(z'|z, k) from two convolutions over the grid of codes.

    The logits start near "everything stays as it is": a learnt multiple of the present code is added to them.

    Raises:
        ValueError: a circular kernel that would reach round the whole grid.
    """

    def __init__(self, settings: TransitionSettings, codes: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.codes, self.grid, self.num_effects = codes, grid, settings.num_effects
        padding = settings.padding or "zeros"
        if padding == "circular" and settings.kernel // 2 > min(grid):
            raise ValueError(
                f"transition.kernel is {settings.kernel}, but in a grid of {grid[0]}x{grid[1]} whose edges wrap it may be at most "
                f"{2 * min(grid) + 1}."
            )
        convolution = dict(kernel_size=settings.kernel, padding=settings.kernel // 2, padding_mode=padding)
        edges = torch.zeros(4, *grid)  # top, bottom, left, right: to be available_metrics apart where the other side is seen beyond them
        edges[0, 0], edges[1, -1], edges[2, :, 0], edges[3, :, -1] = 1, 1, 1, 1
        self.register_buffer("edges", edges[: 4 if padding == "circular" else 0], persistent=False)
        self.features = nn.Sequential(
            nn.Conv2d(codes + len(self.edges), settings.width, **convolution), nn.GroupNorm(1, settings.width), nn.SiLU(),
            nn.Conv2d(settings.width, settings.width, **convolution), nn.GroupNorm(1, settings.width), nn.SiLU(),
        )  # fmt: skip
        self.head = nn.Linear(settings.width, settings.num_effects * codes)
        self.stay = nn.Parameter(torch.tensor(4.0))
        self.marginal = nn.Parameter(torch.zeros(settings.num_effects))  # logits of p0(k), the context-free prior
        bits = torch.randint(2**62, (grid[0] * grid[1],), generator=torch.Generator().manual_seed(0))
        self.register_buffer("fingerprint", bits, persistent=False)

    def hidden(self, codes: Tensor) -> Tensor:
        """Features (B, S, width) of code grids (B, S, C), one-hot."""
        pictures = codes.view(-1, *self.grid, self.codes).permute(0, 3, 1, 2)
        if len(self.edges):
            pictures = torch.cat([pictures, self.edges.expand(len(pictures), -1, -1, -1)], 1)
        return self.features(pictures).flatten(2).transpose(1, 2)

    def _logits(self, codes: Tensor, codes_first: bool) -> Tensor:
        """Of every code at every patch under every outcome: (B, S, K, C), where the likeliest code is found sooner, or with
        `codes_first` (B, S, C, K), where normalising over the codes takes half the time."""
        weight, bias = (x.view(self.num_effects, self.codes, *x.shape[1:]) for x in (self.head.weight, self.head.bias))
        staying = (self.stay * torch.eye(self.codes, device=codes.device)).expand(self.num_effects, -1, -1)
        weight = torch.cat([weight, staying], -1)  # (K, C, W + C): the present code, too, is an input, and raises its own logit
        if codes_first:
            weight, bias = weight.transpose(0, 1), bias.t()
        present = one_hot(codes, self.codes)
        features = torch.cat([self.hidden(present), present], -1)
        return F.linear(features, weight.flatten(0, 1), bias.flatten()).view(*codes.shape, *bias.shape)

    def log_likelihood(self, codes: Tensor, next_codes: Tensor) -> Tensor:
        """log p(z'|z, k) (B, K), summed over patches, of code grids (B, S) uint8."""
        logarithms = self._logits(codes, codes_first=True).log_softmax(2)
        index = next_codes.long()[:, :, None, None].expand(-1, -1, 1, self.num_effects)
        return logarithms.gather(2, index)[:, :, 0].sum(1)

    @torch.no_grad()
    def predict(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """What every outcome would lead to from code grids (B, S) uint8.

        Returns:
            the likeliest next grids (B, K, S) uint8, and for each outcome the first one that leads to the same grid, (B, K) int64.
        """
        grids = self._logits(codes, codes_first=False).argmax(-1).transpose(1, 2)  # (B, K, S)
        key = self.key(grids)
        same = key[:, :, None] == key[:, None]  # (B, K, K)
        return grids.to(torch.uint8), same.byte().argmax(-1)

    def key(self, codes: Tensor) -> Tensor:
        """A number (...) int64 of each grid (..., S): 62 random bits a patch, so that equal numbers mean equal grids."""
        return (codes * self.fingerprint).sum(-1)

    @torch.no_grad()
    def split(self, codes: Tensor, next_codes: Tensor, generator: torch.Generator, unsure: float = 0.2) -> bool:
        """Give an outcome that stands for two effects a twin, in the place of one that nothing would miss.

        A mixture trained by gradient can end with two effects under one name and several names for another; within a
        lifetime nothing tells them apart later. The remedy is a split move (Ueda et al., "SMEM Algorithm for Mixture
        Models", 2000): where the steps that outcome k explains cost more than `unsure` nll each, the outcome whose
        removal costs least becomes a copy of k, disturbed a little; the next updates tell the two apart.

        Args:
            codes, next_codes: (N, S) uint8, a sample of steps.
            generator: of the disturbance.
            unsure: nll.

        Returns:
            whether an outcome was split.
        """
        joint = self.log_likelihood(codes, next_codes) + self.marginal.log_softmax(0)
        label = joint.softmax(-1)  # (N, K)
        usage = label.mean(0)
        cost = (label * -(joint - self.marginal.log_softmax(0))).mean(0) / usage.clamp_min(1e-6)
        missed = -torch.log1p(-label.clamp_max(1 - 1e-6)).mean(0)  # what the mixture would lose without each outcome
        worst = (cost.masked_fill(usage < 0.01, 0) * usage).argmax()
        spare = missed.index_fill(0, worst, torch.inf).argmin()
        if cost[worst] < unsure or missed[spare] > 0.1:
            return False
        for parameter in (self.head.weight, self.head.bias):
            rows = parameter.view(self.num_effects, self.codes, -1)
            noise = torch.randn(rows[worst].shape, generator=generator, device=rows.device)
            rows[spare] = rows[worst] + 0.1 * rows[worst].std() * noise
        self.marginal[worst] -= math.log(2)
        self.marginal[spare] = self.marginal[worst]
        return True


class EffectCache:
    """`EffectNetwork.predict` while the network stays as it is: each grid's are computed once and looked up from then on.

    Each grid has one slot that it may lie in, as in a direct-mapped cache; whatever lay there before is forgotten.

    Args:
        network: must not learn as long as this table is used.
        slots: grids that are remembered at most, and no more than fit into 64 MB; on CPUs memory is taken as they come.
    """

    def __init__(self, network: EffectNetwork, slots: int = 1 << 15) -> None:
        self.network, device, K, S = network, network.fingerprint.device, network.num_effects, len(network.fingerprint)
        slots = min(slots, (64 << 20) // (K * (S + 8)))
        self.owner = torch.full((slots,), -1, device=device)  # the key of the grid that each slot is for
        self.grids = torch.empty((slots, K, S), dtype=torch.uint8, device=device)
        self.first = torch.empty((slots, K), dtype=torch.int64, device=device)

    def __call__(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """See `EffectNetwork.predict`."""
        key = self.network.key(codes)
        slot = key % len(self.owner)
        new = (self.owner[slot] != key).nonzero()[:, 0]
        grids, first = self.grids.index_select(0, slot), self.first.index_select(0, slot)
        if len(new):
            grids[new], first[new] = self.network.predict(codes[new])
            self.owner[slot[new]] = key[new]
            new = new[self.owner[slot[new]] == key[new]]  # where two want one slot, one of them has it
            self.grids[slot[new]], self.first[slot[new]] = grids[new], first[new]
        return grids, first


class TransitionModel(nn.Module):
    """Outcomes, effect posterior, and the FiLM-modulated prior, reward and end of the episode.

    Args:
        settings: see `TransitionSettings`.
        codes: number of codes C.
        grid: (rows, columns) of patches; S = rows * columns.
        context_dim: size D of one row of the context.
    """

    def __init__(self, settings: TransitionSettings, codes: int, grid: tuple[int, int], context_dim: int) -> None:
        super().__init__()
        self.settings, self.codes = settings, codes
        self.effects = EffectNetwork(settings, codes, grid)
        width, pair, outputs = settings.prior_width, settings.contact_width, len(settings.reward_bins) + 1
        self.action_features = nn.Parameter(torch.randn(1, 1, width))
        self.prior_film = FiLMLayer(context_dim, width, settings.film_scale)
        self.prior_out = nn.Sequential(
            nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, settings.num_effects)
        )
        self.contact_in = nn.Sequential(nn.Linear(2 * codes, pair), nn.SiLU(), nn.Linear(pair, pair))
        self.contact_film = FiLMLayer(context_dim, pair, settings.film_scale)
        self.contact_out = nn.Linear(pair, outputs)
        self.register_buffer("reward_bins", torch.tensor(settings.reward_bins), persistent=False)
        self.register_buffer("pairs", pair_codes(codes), persistent=False)

    def contextual_parameters(self) -> list[nn.Parameter]:
        """The parameters that learn with the context engine: all but the outcome network's."""
        return [p for name, p in self.named_parameters() if not name.startswith("effects.")]

    # ------------------------------------------------------------------------------------------- answers

    def effect_posterior(self, likelihood: Tensor) -> Tensor:
        """q(k|z, z') (B, K), which outcome happened, of log p(z'|z, k) (B, K): under the context-free prior, so that
        the name of what happened does not hang on what was believed."""
        return (likelihood + self.effects.marginal.log_softmax(0)).softmax(-1)

    def nll(self, likelihood: Tensor, action: Tensor, context: Tensor) -> Tensor:
        """-log sum_k pi(k|a, c) p(z'|z, k) (B,), nll: how unexpected the step was under contexts (B, A + 1, D)."""
        return -(self._chosen_prior(context, action) + likelihood).logsumexp(-1)

    def log_prior(self, context: Tensor) -> Tensor:
        """log pi(k|a, c) (B, A, K) of contexts (B, A, D), one row for each action asked about."""
        features = self.prior_film(self.action_features.expand(*context.shape[:2], -1), context)
        return self.prior_out(features).log_softmax(-1)

    def reward_and_termination(self, present: Tensor, context: Tensor, row: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Reward and end of the episode from what contact_features what.

        Args:
            present: (N, C*C) bool, see `contact_pairs`.
            context: (B, D), of the world.
            row: (N,) int64, which context each is asked under, so that what they share is computed once; None for each its own.

        Returns:
            log p(r) (N, bins) over `reward_bins`, and the logit (N,) that the episode terminates.
        """
        occurs = present.any(0)  # a third of the pairs that there could be
        occurs[0] = True  # at least one, or there would be nothing to take the highest of
        occurring = occurs.nonzero()[:, 0]
        features = self.contact_in(self.pairs[occurring]).expand(len(context), -1, -1)
        features = F.silu(self.contact_film(features, context))
        if row is not None:
            features = features.index_select(0, row)
        out = self.contact_out(features.masked_fill_(~present[:, occurring, None], ABSENT).amax(-2))
        return out[..., :-1].log_softmax(-1), out[..., -1]

    # -------------------------------------------------------------------------------------------- losses

    def two_hot(self, reward: Tensor) -> Tensor:
        """Rewards (N,) as weights (N, bins) of the two bins around them, whose mean they are (as in DreamerV3, Hafner et
        al., 2023); beyond the outer bins as those."""
        bins, reward = self.reward_bins, reward.clamp(self.reward_bins[0], self.reward_bins[-1])
        above = torch.searchsorted(bins, reward).clamp_min(1)
        share = (reward - bins[above - 1]) / (bins[above] - bins[above - 1])
        low, high = F.one_hot(above - 1, len(bins)), F.one_hot(above, len(bins))
        return low * (1 - share[:, None]) + high * share[:, None]

    def effect_loss(self, experience: Experience, n_actions: int, likelihood_exponent: float) -> dict[str, Tensor]:
        """Learn what can happen; nll a step, mean over (B, T) steps. Three phases by `likelihood_exponent`:

        0 (free):      L = -log sum_k p0(k) p(z'|z, k)
        below 1:       L = -sum_k q(k) log p(z'|z, k) + 0.1 * free,  q(k) ~ p(z'|z, k)^likelihood_exponent pi(k|a)
        1 (exact):     L = -log sum_k pi(k|a) p(z'|z, k)  + 0.1 * free

        pi is the leave-one-out prior of the lifetime: within one task an action has one effect, so what the *other*
        uses of the same action did says what this one should be called,

            pi(k|a_t) = (p0(k) + sum_{s != t, a_s = a_t} q_s(k)) / (1 + n_a - 1),

        iterated twice, with gradients stopped. Without it an outcome's meaning drifts with the picture; with it from
        the first update all moves of a colour collapse into one outcome; without tempering wrong labels lock in.

        Args:
            experience: (B, T, ...) steps; counts run within equal (row, segment, action).
            n_actions: A.
            likelihood_exponent: see above.
        """
        B, T = experience.action.shape
        network = self.effects
        likelihood = network.log_likelihood(experience.codes.flatten(0, 1), experience.next_codes.flatten(0, 1))
        log_marginal = network.marginal.log_softmax(0)
        free = -(likelihood + log_marginal).logsumexp(-1).mean()
        if likelihood_exponent == 0:
            return {"marginal": free}
        log_prior = self._lifetime_prior(likelihood.detach().view(B, T, -1), experience, n_actions).flatten(0, 1)
        if likelihood_exponent < 1:
            label = (likelihood_exponent * likelihood.detach() + log_prior).softmax(-1)
            consistent = -(label * likelihood).sum(-1).mean()
        else:
            consistent = -(likelihood + log_prior).logsumexp(-1).mean()
        return {"consistent": consistent, "marginal": 0.1 * free}

    @torch.no_grad()
    def _lifetime_prior(self, likelihood: Tensor, experience: Experience, n_actions: int) -> Tensor:
        """log pi(k|a_t) (B, T, K), see `effect_loss`; likelihood (B, T, K) in logs."""
        marginal = self.effects.marginal.softmax(0)
        group = experience.segment.long() * n_actions + experience.action  # (B, T)
        member = F.one_hot(group).float()  # (B, T, groups)
        prior = marginal.expand_as(likelihood)
        others = member.sum(1).gather(1, group)[..., None] - 1
        for _ in range(2):
            q = (likelihood + prior.log()).softmax(-1)
            totals = member.transpose(1, 2) @ q  # (B, groups, K)
            same = totals.gather(1, group[..., None].expand_as(q)) - q
            prior = ((marginal + same) / (1 + others)).clamp_min(1e-6)
        return prior.log()

    def prior_loss(self, context: Tensor, action: Tensor, posterior: Tensor) -> Tensor:
        """Cross-entropy (N,), nll, of effect posteriors (N, K) under the prior of actions (N,), contexts (N, A+1, D)."""
        return -(posterior * self._chosen_prior(context, action)).sum(-1)

    def _chosen_prior(self, context: Tensor, action: Tensor) -> Tensor:
        """log pi(k|a, c) (N, K) of one action (N,) under each context (N, A + 1, D)."""
        chosen = context.gather(1, action[:, None, None].expand(-1, 1, context.shape[-1]))  # (N, 1, D)
        return self.log_prior(chosen)[:, 0]

    def reward_and_termination_loss(self, context: Tensor, present: Tensor, reward: Tensor, terminated: Tensor) -> dict[str, Tensor]:
        """Cross-entropies (N,), nll, of rewards (N,) and ends (N,) bool; context (N, D), present (N, C*C) bool."""
        log_reward, end = self.reward_and_termination(present, context)
        return {
            "reward": -(self.two_hot(reward) * log_reward).sum(-1),
            "termination": F.binary_cross_entropy_with_logits(end, terminated.float(), reduction="none"),
        }


def entropy(probability: Tensor) -> Tensor:
    """Entropy in nll over the last dimension."""
    return -(probability * probability.clamp_min(math.exp(-30)).log()).sum(-1)


class Value(nn.Module):
    """What a state is worth under a belief, V(z, c), and what a reset_value episode is worth, W(c).

    It reads the belief as well as the state, so a move that teaches is worth something. The state enters through
    keypoints, as in the spatial softmax of Finn et al. (2016), with one change: attention goes to the *codes* that are
    present, each standing at its centre, and not to single patches. So the background, one code on most patches, does
    not drown the few things that matter, and the value wakes earlier. The rows of the context enter through a mean over
    actions: a relabelling of the actions changes nothing.

    Args:
        codes: number of codes C.
        grid: (rows, columns) of patches.
        context_dim: size D of a row of the context.
        keypoints: points P that are found in the grid.
        width: hidden features.
    """

    POOLED = 64  # features of the pooled context, of the actions and of the world each

    def __init__(self, codes: int, grid: tuple[int, int], context_dim: int, keypoints: int, width: int) -> None:
        super().__init__()
        points, pooled = keypoints, 2 * self.POOLED
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
        self.reset_out = nn.Sequential(nn.Linear(pooled, 128), nn.SiLU(), nn.Linear(128, 1))
        nn.init.zeros_(self.state_out.weight)
        nn.init.zeros_(self.reset_out[-1].weight)
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

    def forward(self, statistics: Tensor, pooled: Tensor, row: Tensor | None = None) -> Tensor:
        """V (B,) of states by `statistics` (B, C, 3) under pooled contexts (B, 128); with `row` (B,) int64 these may be fewer, and
        state i is read under pooled[row[i]]."""
        features = F.silu(self.code_film(self.code_features.expand(len(pooled), -1, -1), pooled))
        of_codes = self.code_out(features)
        if row is not None:
            of_codes = of_codes.index_select(0, row)
        key, value = of_codes.chunk(2, -1)  # (B, C, P) each
        count, centre = statistics[..., :1], statistics[..., 1:]
        masked = key.masked_fill(count == 0, ABSENT)
        weight = (4 * masked).softmax(1)
        points = weight.transpose(1, 2) @ centre
        state = torch.cat([points.flatten(1), masked.amax(1), (weight * value).sum(1)], -1)
        state = F.silu(self.state_film(self.state_norm(self.state_in(state)), pooled, row))
        state = state + F.silu(self.state_hidden(state))
        return self.state_out(state)[:, 0]

    def reset_value(self, pooled: Tensor) -> Tensor:
        """W (B,): the value of beginning an episode under pooled contexts (B, 128)."""
        return self.reset_out(pooled)[:, 0]
