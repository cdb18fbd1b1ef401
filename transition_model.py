"""The transition model: which effects exist, which one an action will have in this task, and what follows from it.

*Effects* p(z'|z, k), k = 1..K, depend on neither action nor context. They are the changes of the code grid that can
occur in any task ("the red object moves left"). Within one task an action has one effect, so what each action does over
whole lifetimes says which effects there are and how many: `find_effects`. The *effect posterior* q(k|z, z') identifies
which one did occur.

The rest is FiLM-modulated by the context, which stands for the task: the *prior* pi(k|a, c) of the effects; the *reward
and termination heads*, which read the *contact features*, that is, which pairs (code before, code after) occur at some
patch, and from the memory of places what came with a code at its place so far.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from film_layer import FiLMLayer, modulate
from memory import Experience, PlaceMemory, require_all

SMOOTHING = 0.05  # added to counts of changes
ODD = 0x5851F42D4C957F2D  # any odd number of 63 bits, for hashes
ABSENT = -1e4  # stands for minus infinity in a masked maximum, without NaN gradients


@dataclass(frozen=True)
class TransitionSettings:
    """Effects, their prior, reward and termination."""

    max_effects: int = 64  # effects that are told apart at most, 2 to 255; how many there are is found
    width: int = 24  # channels of the effect network, at least 1
    kernel: int = 3  # side of the effect network's convolutions in patches, odd
    # beyond the grid's edge the effect network sees zeros or, if circular, the opposite side, and then edges are marked
    # in its input; empty: circular if edges may wrap, else zeros
    padding: Literal["", "zeros", "circular"] = ""
    prior_width: int = 64  # hidden features of the prior, at least 1
    contact_width: int = 64  # features of a pair (code before, code after), at least 1
    place_width: int = 32  # features of such a pair at its place, at least 1
    place_scale: float = 5.0  # factor on PyTorch's initial weights of what happened at a place: one visit counts
    reward_bins: tuple[float, ...] = (-1.0, 0.0, 1.0)  # rewards that the environment gives, at least two, increasing
    film_scale: float = 3.0  # factor on PyTorch's initial FiLM weights: one experience must change predictions
    learning_rate: float = 6e-3  # Adam's initial learning rate of the effects, in [0, 1]; it decays with the run

    def __post_init__(self) -> None:
        widths = dict.fromkeys(("width", "prior_width", "contact_width", "place_width"), (1, 4096))
        require_all("transition", self, max_effects=(2, 255), kernel=(1, 31), film_scale=(0, 100), place_scale=(0, 100))
        require_all("transition", self, **widths, learning_rate=(0, 1))
        if self.kernel % 2 == 0:
            raise ValueError(f"transition.kernel is {self.kernel}, but must be odd: choose {self.kernel + 1}.")
        if self.padding not in ("", "zeros", "circular"):
            raise ValueError(f"transition.padding is {self.padding!r}: choose zeros, circular, or leave it empty.")
        increasing = all(-math.inf < a < b < math.inf for a, b in itertools.pairwise(self.reward_bins))
        if len(self.reward_bins) < 2 or not increasing:
            raise ValueError(f"transition.reward_bins is {self.reward_bins}: give at least two increasing numbers.")


def pair_of(codes: Tensor, next_codes: Tensor, n_codes: int) -> Tensor:
    """Numbers (...) int64, from 0 to n_codes**2 - 1, of pairs of a code before and a code after (...) uint8."""
    return codes.long() * n_codes + next_codes


def contact_pairs(pair: Tensor, n_codes: int) -> Tensor:
    """Which pairs occur at some patch: (..., n_codes**2) bool, of the patches' pairs (..., S), see `pair_of`."""
    absent = torch.zeros(*pair.shape[:-1], n_codes**2, dtype=torch.bool, device=pair.device)
    return absent.scatter_(-1, pair, True)


def occurring_pairs(present: Tensor) -> Tensor:
    """Which pairs (m,) int64 occur anywhere in contacts (N, C*C) bool, so that no others need be computed: 16 of 36 in
    the default world, 25 of 576 in a room of MiniGrid."""
    return present.any(0).nonzero()[:, 0]


def largest_of(features: Tensor, index: Tensor, group: Tensor, groups: int) -> Tensor:
    """The largest in each group of features[index]: (groups, F) of features (M, F), index and group (n,) int64."""
    features = features.index_select(0, index)
    lowest = features.new_full((groups, features.shape[1]), ABSENT)
    return lowest.scatter_reduce(0, group[:, None].expand_as(features), features, "amax")


def describe_pairs(n_codes: int) -> Tensor:
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


def top_p_filter(probability: Tensor, top_p: float) -> Tensor:
    """The fewest of probabilities (..., n) that together have at least `top_p`, renormalised; zeros elsewhere."""
    ordered, index = probability.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    weight = torch.zeros_like(probability).scatter_(-1, index, ordered * (before < top_p))
    return weight / weight.sum(-1, keepdim=True)


def random_bits(n: int) -> Tensor:
    """Numbers (n,) int64 of 62 random bits, always the same: what hashes are sums of."""
    return torch.randint(2**62, (n,), generator=torch.Generator().manual_seed(0))


def distinct(key: Tensor) -> tuple[Tensor, Tensor]:
    """Where each different key first occurs (n,), and which of these each of keys (N,) int64 is (N,)."""
    each, which = key.unique(return_inverse=True)
    place = torch.arange(len(key), device=key.device)
    return torch.empty_like(each).scatter_reduce_(0, which, place, "amin", include_self=False), which


def change_keys(codes: Tensor, next_codes: Tensor, columns: int, first: Tensor) -> Tensor:
    """A hash (N, S) int64 of every change from codes to next_codes (N, S) uint8, at its first patch; zero elsewhere.

    All patches that changed and have the same `first` (N, S) patch are one change. Where it lies does not count.
    """
    place = torch.arange(codes.shape[1], device=codes.device)
    down, right = place // columns - first // columns, place % columns - first % columns
    digits = (down.clamp_min(0), right + columns, codes.long(), next_codes.long())
    index = digits[0]
    for digit, base in zip(digits[1:], (2 * columns, 256, 256), strict=True):
        index = index * base + digit
    # Multiplication by odd constants and shifts mix the bits (Steele et al., "SplitMix", 2014).
    for factor in (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15):
        index = (index ^ (index >> 29)) * factor
    return torch.zeros_like(index).scatter_add_(1, first, index * (codes != next_codes))


def connected(changed: Tensor, grid: tuple[int, int]) -> Tensor:
    """For every patch that changed the first one of those connected with it, diagonals included: (N, S) int64 of (N, S)
    bool. Any other patch has the last number."""
    S = changed.shape[1]
    label = torch.where(changed, torch.arange(S, device=changed.device), S).float().view(-1, 1, *grid)
    while True:
        lowest = torch.where(changed.view_as(label), -F.max_pool2d(-label, 3, 1, 1), label)
        if torch.equal(lowest, label):
            return label.flatten(1).long().clamp_max(S - 1)
        label = lowest


def change_counts(
    experience: Experience, n_actions: int, grid: tuple[int, int], least: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    """How often which change happened after which action of which lifetime.

    A change is all that differs between two grids, wherever it lies. One that occurs less often than `least` is taken
    apart into its connected parts; parts that are as rare are left out, and so are all but the 512 most frequent.

    Returns:
        counts (L, A, D) float32 for the L lifetimes under one rule in experience (n, T, ...), which of them each step
        belongs to: (n, T) int64, and which change each step is as a whole: (n, T) int64, -1 if none of the D.
    """
    codes, next_codes = experience.codes.flatten(0, 1), experience.next_codes.flatten(0, 1)
    changed, columns = codes != next_codes, grid[1]
    whole = change_keys(codes, next_codes, columns, changed.byte().argmax(1, keepdim=True).expand_as(codes)).sum(1)
    _, index, count = whole.unique(return_inverse=True, return_counts=True)
    often = count[index] >= least
    common, rare = often.nonzero()[:, 0], (~often).nonzero()[:, 0]
    parts = change_keys(codes[rare], next_codes[rare], columns, connected(changed[rare], grid))
    of, at = parts.nonzero(as_tuple=True)
    step, key = torch.cat([common, rare[of]]), torch.cat([whole[common], parts[of, at]])
    _, change, count = key.unique(return_inverse=True, return_counts=True)
    column = torch.full_like(count, -1)
    kept = count.argsort(descending=True, stable=True)[: min(512, int((count >= least).sum()))]
    column[kept] = torch.arange(len(kept), device=kept.device)
    column = column[change]
    whole = torch.full((len(codes),), -1, device=codes.device)
    whole[common] = column[: len(common)]
    step, column = step[column >= 0], column[column >= 0]
    lifetime = torch.arange(len(experience.action), device=codes.device)[:, None] * 256 + experience.segment.long()
    lifetime = lifetime.unique(return_inverse=True)[1]  # (n, T)
    rows = (lifetime * n_actions + experience.action).flatten()[step]
    shape = (int(lifetime.max()) + 1, n_actions, len(kept))
    counts = torch.bincount(rows * len(kept) + column, minlength=math.prod(shape)).view(shape).float()
    return counts, lifetime, whole.view_as(lifetime)


def fit_changes(
    label: Tensor, slipped: Tensor, counts: Tensor, kind: Tensor, slip: float, rounds: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Expectation maximization of a mixture of M multinomials over D changes, for A actions of L lifetimes of W kinds.

    An action of lifetime l has component m with probability p(m | kind of l), and then each change d after it is

        p(d) = (1 - s_l) p(d|m) + s_l b_l(d),

    where b_l, the background, is what happens in lifetime l whatever the action, such as gusts.

    Args:
        label: (L, A, M) float32, the probabilities of the components to begin with.
        slipped: (L, D) float32, the changes that the background explains to begin with.
        counts: (L, A, D) float32; kind: (L,) int64.
        slip: what is expected of s, the share of the background; 0 for none.

    Returns:
        the new label and slipped, the changes that each component explains (M, D), the probability (L, M, D) that it
        does explain a change after its actions, and the log likelihood.
    """
    kinds, own = F.one_hot(kind).float(), torch.einsum("lam,lad->md", label, counts)
    for _ in range(rounds):
        change, prior = own + SMOOTHING, kinds.T @ label.sum(1) + 0.01
        change, prior = change / change.sum(1, keepdim=True), prior / prior.sum(1, keepdim=True)
        share = (slipped.sum(1) + 8 * slip) / (counts.sum((1, 2)) + 8)
        background = slipped + (20 * prior @ change)[kind]
        background = background * (share / background.sum(1))[:, None]  # s b
        clean = (1 - share)[:, None, None] * change  # (L, M, D)
        mixed = clean + background[:, None]
        joint = torch.einsum("lad,lmd->lam", counts, mixed.log()) + prior.log()[kind][:, None]
        label = joint.softmax(-1)
        explained = torch.einsum("lam,lad->lmd", label, counts)
        explains = clean / mixed
        own, slipped = (explained * explains).sum(0), (explained * (1 - explains)).sum(1)
    return label, slipped, own, explains, joint.logsumexp(-1).sum()


def cluster_changes(
    counts: Tensor,
    features: Tensor,
    kind: Tensor,
    clusters: int,
    slip: float,
    penalty: float,
    most: int,
    generator: torch.Generator,
) -> tuple[Tensor, float, Tensor]:
    """Labels (L, A) of counts (L, A, D), their penalised log likelihood, and the probability (L, A, D) that a change
    after an action is its own; see `find_effects`.

    Begins with k-means++ (Arthur & Vassilvitskii, 2007) in features (L, A, D) within each kind of lifetime, and merges
    components while the penalised likelihood gains or there are more than `most`; one of less than 1.5 actions is
    merged wherever that costs least.
    """
    label = torch.zeros(counts.shape[:2], dtype=torch.int64, device=counts.device)
    for number in range(int(kind.max()) + 1):
        points = features[kind == number].flatten(0, 1)
        centres = points[torch.randint(len(points), (1,), generator=generator, device=points.device)]
        while len(centres) < clusters:
            weight = torch.cdist(points, centres).amin(1).square().clamp_min(1e-9)
            centres = torch.cat([centres, points[torch.multinomial(weight, 1, generator=generator)]])
        nearest = torch.cdist(points, centres).argmin(1).view(-1, counts.shape[1])
        label[kind == number] = number * clusters + nearest
    label = F.one_hot(label.unique(return_inverse=True)[1]).float()
    kinds, price = F.one_hot(kind).float(), penalty * math.log(label[..., 0].numel())  # of a parameter
    label, slipped, own, explains, likelihood = fit_changes(label, slip * counts.sum(1), counts, kind, slip, rounds=30)
    while True:
        mass = torch.einsum("lw,lam->mw", kinds, label)  # (M, W): actions by component and kind
        pairs, pair_mass = own[:, None] + own, mass[:, None] + mass
        together = component_likelihood(pairs, pair_mass, kinds.sum(0))
        alone = component_likelihood(own, mass, kinds.sum(0))
        loss = alone[:, None] + alone - together - price * (pairs > 2).sum(-1)
        loss = loss.fill_diagonal_(torch.inf)
        i, j = divmod(int(loss.argmin()), len(mass))
        least = int(mass.sum(1).argmin())
        if len(mass) > 1 and mass[least].sum() < 1.5:  # of nearly nothing: merged wherever it costs least
            i, j = int(loss[least].argmin()), least
        elif len(mass) == 1 or (loss[i, j] > 0 and len(mass) <= most):
            best = label.argmax(-1)
            explains = explains.take_along_dim(best[..., None], 1)
            return best.unique(return_inverse=True)[1], float(likelihood - price * (own > 1).sum()), explains
        label[..., i] += label[..., j]
        label = label[..., torch.arange(len(mass), device=label.device) != j]
        label, slipped, own, explains, likelihood = fit_changes(label, slipped, counts, kind, slip, rounds=5)


def component_likelihood(changes: Tensor, mass: Tensor, total: Tensor) -> Tensor:
    """Log likelihood (...) of changes (..., D) under their own frequencies, with masses (..., W) of totals (W,)."""
    p = (changes + SMOOTHING) / (changes + SMOOTHING).sum(-1, keepdim=True)
    return torch.special.xlogy(changes, p).sum(-1) + torch.special.xlogy(mass, mass / total).sum(-1)


@torch.no_grad()
def find_effects(
    experience: Experience, n_actions: int, grid: tuple[int, int], most: int, seed: int, restarts: int = 3
) -> tuple[Tensor, Tensor, int]:
    """Which effect every action has in every lifetime, and how many effects there are.

    Two steps, on counts of changes alone. First lifetimes are clustered by all that happened in them, into kinds: a
    lifetime has one body and one kind of edge. Then actions are clustered, by what happened after them beyond what
    happened in their lifetime anyway, beginning within each kind and merging over all of them. Both begin with too many
    clusters and merge two while the Bayesian information criterion gains (Figueiredo & Jain, "Unsupervised Learning of
    Finite Mixture Models", 2002); the best of some restarts is taken.

    Args:
        experience: (n, T, ...), random behaviour.
        n_actions: A.
        grid: (rows, columns).
        most: number of effects at most.
        seed: of the restarts.

    Returns:
        labels (n, T) int64, from 0 on, of every step: the effect of its action. The probability (n, T) float32 that
        the step shows it, a half for rare changes. The number of effects, one more than there are labels where no
        action does nothing: then only slips leave everything as it is.
    """
    counts, lifetime, whole = change_counts(experience, n_actions, grid)
    generator = torch.Generator(counts.device).manual_seed(seed)
    none = torch.zeros(len(counts), dtype=torch.int64, device=counts.device)
    share = counts / counts.sum(-1, keepdim=True).clamp_min(1)
    beyond = (share - share.amin(1, keepdim=True)).sqrt()  # what happens after all actions says nothing about one
    together = counts.sum(1, keepdim=True)
    overall = (together / together.sum(-1, keepdim=True).clamp_min(1)).sqrt()
    found = []
    for _ in range(restarts):
        # Twice the penalty of actions: the counts of a lifetime also vary with its wind and the body's way, which must
        # not make kinds.
        kind, *_ = cluster_changes(together, overall, none, 24, 0.0, 1.0, len(together), generator)
        # One fewer than `most`, because standing still may come on top.
        found.append(cluster_changes(counts, beyond, kind[:, 0], 2 * n_actions, 0.25, 0.5, most - 1, generator))
    label, _, explains = max(found, key=lambda one: one[1])
    label = label[lifetime, experience.action]
    still = (experience.codes == experience.next_codes).all(-1).flatten().double()
    share = torch.bincount(label.flatten(), still) / torch.bincount(label.flatten()).clamp_min(1)  # without any change
    shown = F.pad(explains, (0, 1), value=0.5)[lifetime, experience.action, whole]  # -1, rare changes, is the last one
    return label, shown, len(share) + int(share.max() < 0.5)


class EffectNetwork(nn.Module):
    """The effects p(z'|z, k): a categorical for every patch, by two convolutions over the grid of codes.

    A learned multiple of the present code is added to the logits, so that initially every effect most likely leaves
    the grid as it is. For the arguments see `TransitionModel`.

    Raises:
        ValueError: a circular kernel that would reach around the whole grid.
    """

    def __init__(self, settings: TransitionSettings, codes: int, grid: tuple[int, int], num_effects: int) -> None:
        super().__init__()
        kernel, width = settings.kernel, settings.width
        self.codes, self.grid = codes, grid
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
        self.stay = nn.Parameter(torch.tensor(4.0))  # added to the logit of the present code
        self.set_num_effects(num_effects)
        self.register_buffer("fingerprint", random_bits(grid[0] * grid[1]), persistent=False)

    def set_num_effects(self, num_effects: int) -> None:
        """Begin anew with K effects, all equal but for their random initial weights."""
        width, device = self.features[0].out_channels, self.stay.device
        self.num_effects = num_effects
        self.head = nn.Linear(width, num_effects * self.codes, device=device)
        self.marginal = nn.Parameter(torch.zeros(num_effects, device=device))  # logits of p0(k), the context-free prior

    @torch.no_grad()
    def init_marginal(self, label: Tensor) -> None:
        """Begin p0 with the shares of labels (...) int64, each count raised to at least a twentieth of all labels."""
        count = torch.bincount(label.flatten(), minlength=self.num_effects)
        self.marginal.copy_(count.clamp_min(label.numel() // 20 + 1).log())

    def hidden(self, codes: Tensor) -> Tensor:
        """Features (B, S, width) of one-hot code grids (B, S, C)."""
        grids = codes.view(-1, *self.grid, self.codes).permute(0, 3, 1, 2)  # (B, C, rows, columns)
        if len(self.edges):
            grids = torch.cat([grids, self.edges.expand(len(grids), -1, -1, -1)], 1)
        return self.features(grids).flatten(2).transpose(1, 2)  # (B, S, width)

    def _logits(self, codes: Tensor, codes_first: bool) -> Tensor:
        """Logits of every code at every patch under every effect, in one of two memory layouts.

        (B, S, K, C) makes the maximum over the codes faster; (B, S, C, K), with `codes_first`, the sum
        over the codes. Only the rows of the head are reordered, not the result.
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
        each, which = distinct(self.key(codes))  # grids occur again and again: each is computed once
        log_p = self._logits(codes[each], codes_first=True).log_softmax(2)  # (n, S, C, K)
        place = torch.arange(codes.shape[1], device=codes.device)
        index = (which[:, None] * len(place) + place) * self.codes + next_codes  # (B, S)
        return log_p.flatten(0, 2).index_select(0, index.flatten()).view(*codes.shape, -1).sum(1)

    @torch.no_grad()
    def predict(self, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The most likely next grids (B, K, S) uint8 under every effect, of code grids (B, S) uint8.

        Also the first effect that leads to the same grid as each effect, and the grids' keys: (B, K) int64 each.
        """
        # `max` is faster than `argmax`.
        grids = self._logits(codes, codes_first=False).max(-1).indices.transpose(1, 2)  # (B, K, S)
        key = self.key(grids)
        same = key[:, :, None] == key[:, None]  # (B, K, K)
        return grids.to(torch.uint8), same.byte().argmax(-1), key

    def predict_each_once(self, codes: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `predict`, of codes and their keys (B,), but grids that occur again and again, as in stored lifetimes, are
        computed once."""
        each, which = distinct(key)
        return tuple(part[which] for part in self.predict(codes[each]))

    def key(self, codes: Tensor) -> Tensor:
        """A hash (...) int64 of each grid (..., S), by 62 random bits per patch: equal keys mean equal grids."""
        return (codes * self.fingerprint).sum(-1)


class Expansion(NamedTuple):
    """What may happen next in N states: P likely effects in all, each shared by the actions that may have it."""

    row: Tensor  # (N,) int64: which decision the state belongs to
    key: Tensor  # (N,) int64: a hash of its grid of codes and its row
    probability: Tensor  # (N, A, K) float: of every effect after every action, renormalised over the likely ones
    state: Tensor  # (P,) int64: which state the effect starts from
    effect: Tensor  # (P,) int64: which effect it is, 0 to K - 1
    next_codes: Tensor  # (P, S) uint8: the grid of codes that it leads to
    next_key: Tensor  # (P,) int64: a hash of that grid and its row
    reward: Tensor  # (P,) float: expected
    end: Tensor  # (P,) float: probability that the episode ends
    next_value: Tensor  # (P,) float: V, the value of going on
    reset_value: Tensor  # (P,) float: W, the value of a new episode

    @staticmethod
    def join(parts: list[Expansion]) -> Expansion:
        """Several expansions as one, their states numbered on."""
        first = itertools.accumulate((len(part.row) for part in parts), initial=0)
        parts = [part._replace(state=part.state + n) for part, n in zip(parts, first, strict=False)]
        return Expansion(*map(torch.cat, zip(*parts, strict=True)))

    def back_up(self, next_value: Tensor, discount: float) -> Tensor:
        """Q (N, A), where going on after each effect has `next_value` (P,)."""
        following = torch.lerp(next_value, self.reset_value, self.end)
        of_effect = self.probability.new_zeros(len(self.probability), self.probability.shape[-1])  # (N, K)
        of_effect[self.state, self.effect] = torch.add(self.reward, following, alpha=discount)
        return self.probability.bmm(of_effect[:, :, None])[..., 0]


class EffectCache:
    """A direct-mapped cache of `EffectNetwork.predict`: same arguments, same results, each grid computed once.

    Every grid has exactly one slot where it can be stored; a new grid replaces the one that was there.

    The network must not change while the cache is in use. `slots` is the largest number of grids, reduced so that they
    take at most 64 MiB. That memory is uninitialized, so a CPU commits only what is used.
    """

    def __init__(self, network: EffectNetwork, slots: int = 1 << 15) -> None:
        device, K, S = network.fingerprint.device, network.num_effects, len(network.fingerprint)
        slots = min(slots, (64 << 20) // (K * (S + 16)))
        self.network = network
        self.keys = torch.full((slots,), -1, device=device)  # of the grid in each slot
        shapes = ((slots, K, S), torch.uint8), ((slots, K), torch.int64), ((slots, K), torch.int64)
        self.stored = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes]  # of `predict`

    def __call__(self, codes: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `EffectNetwork.predict_each_once`."""
        slot = key % len(self.keys)
        found = tuple(part.index_select(0, slot) for part in self.stored)
        missing = (self.keys[slot] != key).nonzero()[:, 0]
        if len(missing):
            slot, key, made = slot[missing], key[missing], self.network.predict(codes[missing])
            self.keys[slot] = key
            kept = self.keys[slot] == key  # if several grids of this batch share a slot, the one whose key it has now
            for part, stored, new in zip(found, self.stored, made, strict=True):
                part[missing] = new
                stored[slot[kept]] = new[kept]
        return found


class TransitionModel(nn.Module):
    """Effects and their posterior; prior, reward and termination, which are FiLM-modulated.

    A context has one row for each of the A actions and a last one, the world row, see context_engine.py.

    Args:
        settings: see `TransitionSettings`.
        codes: number of codes C.
        grid: (rows, columns) of patches; S = rows * columns.
        context_dim: size D of one row of the context.
        num_effects: number of effects K, see `set_num_effects`.
    """

    def __init__(
        self, settings: TransitionSettings, codes: int, grid: tuple[int, int], context_dim: int, num_effects: int = 1
    ) -> None:
        super().__init__()
        width, pair = settings.prior_width, settings.contact_width
        self.settings, self.codes = settings, codes
        self.effects = EffectNetwork(settings, codes, grid, num_effects)
        self.action_features = nn.Parameter(torch.randn(1, 1, width))
        self.prior_film = FiLMLayer(context_dim, width, settings.film_scale)
        self.prior_out = nn.Sequential(
            nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, num_effects)
        )
        self.contact_in = nn.Sequential(nn.Linear(2 * codes, pair), nn.SiLU(), nn.Linear(pair, pair))
        self.contact_film = FiLMLayer(context_dim, pair, settings.film_scale)
        self.contact_out = nn.Linear(pair, len(settings.reward_bins) + 1)
        # What is where adds to the same outputs, nothing at first.
        self.place_pair = nn.Parameter(torch.randn(codes**2, settings.place_width))
        self.place_past = nn.Linear(PlaceMemory.SUMS + 1, settings.place_width)
        self.place_film = FiLMLayer(context_dim, settings.place_width, settings.film_scale)
        last = nn.Linear(settings.place_width, len(settings.reward_bins) + 1, bias=False)
        self.place_out = nn.Sequential(nn.Linear(settings.place_width, settings.place_width), nn.SiLU(), last)
        nn.init.zeros_(self.place_out[-1].weight)
        with torch.no_grad():
            self.place_past.weight.mul_(settings.place_scale)
        self.register_buffer("telling", torch.ones(codes**2, dtype=torch.bool))  # see `find_telling_pairs`
        self.register_buffer("reward_bins", torch.tensor(settings.reward_bins), persistent=False)
        self.register_buffer("pairs", describe_pairs(codes), persistent=False)
        self.register_buffer("bits", random_bits(codes**2), persistent=False)

    def set_num_effects(self, num_effects: int) -> None:
        """Make everything that is as large as the number of effects K anew."""
        last = self.prior_out[-1]
        self.effects.set_num_effects(num_effects)
        self.prior_out[-1] = nn.Linear(last.in_features, num_effects, device=last.weight.device)

    def find_telling_pairs(self, experience: Experience) -> None:
        """Note which pairs (code before, code after) say something about their place: all but scenery that stays, which
        is what fills more than an eighth of the grids, as a floor does, and what never changes, as walls."""
        codes, next_codes = experience.codes.flatten(), experience.next_codes.flatten()
        changed = codes != next_codes
        count = torch.bincount(codes.int(), minlength=self.codes)
        changes = torch.bincount(torch.cat([codes[changed], next_codes[changed]]).int(), minlength=self.codes)
        scenery = (8 * count > len(codes)) | (count > 0) & (changes == 0)
        self.telling.copy_(~torch.diag(scenery).flatten())

    def contextual_parameters(self) -> list[nn.Parameter]:
        """The parameters that are trained with the context engine: all but the effect network's."""
        return [p for name, p in self.named_parameters() if not name.startswith("effects.")]

    def effect_posterior(self, likelihood: Tensor) -> Tensor:
        """q(k|z, z') (B, K) of log p(z'|z, k) (B, K), under a uniform prior: no belief biases what was seen."""
        return likelihood.softmax(-1)

    def nll(self, likelihood: Tensor, action: Tensor, context: Tensor) -> Tensor:
        """-log sum_k pi(k|a, c) p(z'|z, k) (B,), nats, of log p(z'|z, k) (B, K), actions (B,), contexts (B, A+1, D)."""
        own = context.gather(1, action[:, None, None].expand(-1, 1, context.shape[-1]))  # (B, 1, D)
        return -(self.log_prior(own)[:, 0] + likelihood).logsumexp(-1)

    def log_prior(self, context: Tensor) -> Tensor:
        """log pi(k|a, c) (B, A, K) of contexts (B, A, D), one row for each action in question."""
        features = self.prior_film(self.action_features.expand(*context.shape[:2], -1), context)
        return self.prior_out(features).log_softmax(-1)

    def modulate_heads(self, context: Tensor) -> tuple[Tensor, ...]:
        """What modulates the contacts and the places under contexts (B, D), the world rows: scale and shift of each."""
        return *self.contact_film.modulation(context), *self.place_film.modulation(context)

    def reward_and_termination(
        self,
        codes: Tensor,
        next_codes: Tensor,
        places: PlaceMemory,
        modulation: tuple[Tensor, ...],
        row: Tensor,
        earned: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Reward and termination of N steps, from what meets what (contact features) and from what is where.

            logits = W max over contacts of f(contact, c) + U sum over places of g(pair, what came with it there, c)

        The sum is over patches whose pair is telling (`find_telling_pairs`).

        Args:
            codes, next_codes: (N, S) uint8.
            places, modulation: of B lifetimes, the latter from `modulate_heads`.
            row: (N,) int64, which lifetime each step is of.
            earned: (N,), what the episode had earned before the step; that of `places` if not given.

        Returns:
            log p(r) (N, bins) over `reward_bins`, and the logit (N,) of the episode's termination.
        """
        pair, (scale, shift) = pair_of(codes, next_codes, self.codes), modulation[2:]
        out = self._contact_logits(contact_pairs(pair, self.codes), *modulation[:2], row)
        step, place = self.telling[pair].nonzero(as_tuple=True)
        own, pair = row[step], pair[step, place]
        earned = places.earned[own] if earned is None else earned[step]
        past = places.recall(own, place, pair % self.codes, earned)
        features = self.place_pair.index_select(0, pair) + self.place_past(past)
        features = F.silu(modulate(features, scale.index_select(0, own), shift.index_select(0, own)))
        out = out.index_add(0, step, self.place_out(features))
        return out[..., :-1].log_softmax(-1), out[..., -1]

    def _contact_logits(self, present: Tensor, scale: Tensor, shift: Tensor, row: Tensor) -> Tensor:
        """Logits (N, bins + 1) of contacts (N, C*C) bool in lifetimes `row` (N,), modulated by (B, contact_width) each.

        Contacts that occur again in a lifetime are computed once.
        """
        occurring = occurring_pairs(present)
        present = present[:, occurring]
        each, which = distinct((present * self.bits[occurring]).sum(1) + row * ODD)
        rows, own = row[each].unique(return_inverse=True)
        features = self.contact_in(self.pairs[occurring])  # (occurring, contact_width)
        features = F.silu(modulate(features, scale[rows, None], shift[rows, None])).flatten(0, 1)
        step, pair = present[each].nonzero(as_tuple=True)
        return self.contact_out(largest_of(features, own[step] * len(occurring) + pair, step, len(each)))[which]

    def two_hot(self, reward: Tensor) -> Tensor:
        """Rewards (N,) as weights (N, bins) of the two nearest bins, whose weighted mean they are (DreamerV3, Hafner
        et al., 2023). Rewards beyond the outer bins count as those."""
        bins, reward = self.reward_bins, reward.clamp(self.reward_bins[0], self.reward_bins[-1])
        above = torch.searchsorted(bins, reward).clamp_min(1)
        share = (reward - bins[above - 1]) / (bins[above] - bins[above - 1])
        low, high = F.one_hot(above - 1, len(bins)), F.one_hot(above, len(bins))
        return low * (1 - share[:, None]) + high * share[:, None]

    def effect_loss(self, experience: Experience, n_actions: int, labelled: bool = False) -> dict[str, Tensor]:
        """Learn what the effects do; in nats per step.

        An action has one effect m in a lifetime (and under one rule), but any of its steps may show another one: it may
        slip, or the wind blows. The likelihood of step t, if m is the effect of its action, and the loss are

            l_t(m) = log[(1 - e) p(z'|z, m) + e sum_k b(k) p(z'|z, k)]
            L      = -mean_t sum_m r(m|a_t) [0.98 l_t(m) + 0.02 log p(z'|z, m)] - 0.1 mean_t log sum_k p0(k) p(z'|z, k),

        where the background b(k) and its share e are those of the lifetime, and r(m|a) ~ p0(m) exp(sum of l_t(m) over
        the steps of action a). All three come from a few rounds of expectation maximization, without gradients; before
        the effects differ, r(m|a) is given instead and e = 0. The constant log(1 - e) is left out. The small
        share of log p(z'|z, m) is for what m foresees so badly that the background explains it: else it would never be
        learnt. The first mean weighs steps from grids from which an event followed in the batch (a termination or an
        unusual reward) as much as all others together: they are rare and a plan depends on them. What counts is the
        grid before, never what followed, or an effect would seem to do what slips did.

        Args:
            experience: (B, T, ...), whole lifetimes.
            n_actions: A.
            labelled: `experience.posterior` is r(m|a), as `find_effects` found it, times the probability that the step
                shows it.

        Returns:
            consistent, the first mean, and marginal, the second: scalars, whose sum is L.
        """
        B, T = experience.action.shape
        codes, next_codes = experience.codes.flatten(0, 1), experience.next_codes.flatten(0, 1)
        likelihood = self.effects.log_likelihood(codes, next_codes).view(B, T, -1)
        marginal = self.effects.marginal.log_softmax(0)
        group = experience.segment.long() * n_actions + experience.action  # (B, T)
        if labelled:
            explained = (experience.posterior * likelihood).sum(-1)
        else:
            label, odds = self.lifetime_labels(likelihood.detach(), F.one_hot(group).float())
            background = (likelihood + odds).logsumexp(-1, keepdim=True)
            robust = torch.logaddexp(likelihood, background)
            explained = (label * torch.lerp(robust, likelihood, 0.02)).sum(-1)
        _, which = distinct(self.effects.key(codes))
        event = experience.events.flatten()
        event = torch.zeros_like(event).index_put((which,), event, accumulate=True)[which].view(B, T)
        weight = torch.where(event, 0.5 / event.sum().clamp_min(1), 0.5 / (~event).sum().clamp_min(1))
        consistent = -(weight * explained).sum() / weight.sum()
        return {"consistent": consistent, "marginal": -0.1 * (likelihood + marginal).logsumexp(-1).mean()}

    @torch.no_grad()
    def lifetime_labels(self, likelihood: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
        """r(m|a_t) (B, T, K) and log[e b(k) / (1 - e)] (B, 1, K), see `effect_loss`, of log p(z'|z, k) (B, T, K) and of
        which steps have the same action and rule, one-hot (B, T, groups)."""
        marginal = self.effects.marginal.softmax(0)
        share, mixture = likelihood.new_full((len(likelihood), 1, 1), 0.25), marginal.expand(len(likelihood), 1, -1)
        for _ in range(3):
            odds = mixture.log() + share.log() - (1 - share).log()
            background = (likelihood + odds).logsumexp(-1, keepdim=True)
            explained = torch.logaddexp(likelihood, background)
            label = member @ (marginal.log() + member.transpose(1, 2) @ explained).softmax(-1)  # (B, T, K)
            slipped = (label * (background - explained).exp()).sum(-1, keepdim=True)  # (B, T, 1)
            counts = (slipped * (likelihood + odds).softmax(-1)).sum(1, keepdim=True) + 2 * marginal
            mixture = counts / counts.sum(-1, keepdim=True)
            share = ((slipped.sum(1, keepdim=True) + 2) / (likelihood.shape[1] + 8)).clamp_max(0.5)
        return label, odds

    def prior_loss(self, context: Tensor, posterior: Tensor) -> Tensor:
        """-log sum_k q(k) pi(k|a, c) (N,), nats, of posteriors q (N, K) and contexts (N, D), the actions' own rows.

        Up to a constant that is the negative log-likelihood of the step, `nll`. So a step that several effects explain
        alike, such as a move against a wall, leaves open which of them it was.
        """
        return -(self.log_prior(context[:, None])[:, 0] + posterior.clamp_min(1e-7).log()).logsumexp(-1)

    def reward_and_termination_loss(
        self,
        reward: Tensor,
        terminated: Tensor,
        usual: Tensor,
        odds: Tensor,
        *arguments: Tensor | PlaceMemory,
        **options: Tensor,
    ) -> dict[str, Tensor]:
        """Cross-entropies (N,) in nats of rewards (N,), as `two_hot`, and terminations (N,) bool.

        The logits of rewards other than the `usual` one, a scalar, and of terminations are raised by `odds`, a scalar,
        by which such steps count more than others. The other arguments are those of `reward_and_termination`.
        """
        log_reward, end = self.reward_and_termination(*arguments, **options)
        unusual = self.two_hot(usual[None])[0] == 0  # (bins,)
        log_reward = (log_reward + odds * unusual).log_softmax(-1)
        return {
            "reward": -(self.two_hot(reward) * log_reward).sum(-1),
            "termination": F.binary_cross_entropy_with_logits(end + odds, terminated.float(), reduction="none"),
        }
