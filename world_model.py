"""What a picture shows, what it is worth, and what to do: the VAE, pictures to grids of categorical codes and back; the
value of such grids; planning with both, all modulated by the context.

Each patch of the picture becomes one categorical code, so that all later inference and planning work on small integer
grids. Source: Kingma & Welling, "Auto-Encoding Variational Bayes", 2014.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from environment import require_all
from film_layer import FiLMLayer
from memory import Experience
from transition_model import ABSENT, TransitionModel, merged, one_hot, pairs_present


@dataclass(frozen=True)
class VAESettings:
    """Perception."""

    patch: int = 0
    """Pixels along each side of a patch, which must divide the picture; 0 stands for a cell of the world."""
    codes: int = 6
    """Number of categories of a patch, 2 to 255."""
    width: int = 32
    """Hidden features of encoder and decoder, at least 1."""
    alike: float = 0.5
    """Patches nearer than this share of the largest distance begin with one code, in [0, 1]: what noise is taken to do."""
    deviation: float = 0.1
    """Standard deviation of a pixel around its reconstruction, as a share of the range, above 0."""
    decoder_rate: float = 1e-2
    """Adam's learning rate of the decoder while perception is learnt alone."""
    encoder_rate: float = 2e-4
    """That of the encoder: slow, because an untrained decoder would pull its well-begun codes together."""
    final_rate: float = 1.0
    """Meanwhile these rates fall evenly to this share of their beginning, in [0, 1]."""
    late_rate: float = 3e-5
    """Adam's learning rate of both from then on."""

    def __post_init__(self) -> None:
        require_all(
            "vae", self, patch=(0, 64), codes=(2, 255), width=(1, 4096), alike=(0, 1), deviation=(1e-3, 10),
            decoder_rate=(0, 1), encoder_rate=(0, 1), final_rate=(0, 1), late_rate=(0, 1),
        )  # fmt: skip


class VAE(nn.Module):
    """A variational autoencoder with one categorical code for each patch; encoder and decoder are FiLM-modulated.

    Args:
        settings: see `VAESettings`.
        picture: (height, width, channels) of the pictures.
        context_dim: size D of the context vector that modulates it.

    Raises:
        ValueError: the patch does not divide the picture.
    """

    def __init__(self, settings: VAESettings, picture: tuple[int, int, int], context_dim: int) -> None:
        super().__init__()
        height, width, channels = picture
        patch, hidden = settings.patch, settings.width
        if patch < 1:
            raise ValueError("vae.patch is 0, so the size of a cell must be put in its place before a VAE is built.")
        if height % patch or width % patch:
            raise ValueError(
                f"vae.patch is {patch}, which does not divide a picture of {height}x{width}: "
                f"choose a common divisor, such as {math.gcd(height, width)}."
            )
        self.settings, self.picture, self.grid = settings, picture, (height // patch, width // patch)
        pixels = patch * patch * channels
        self.encoder_in = nn.Linear(pixels, hidden)
        self.encoder_film = FiLMLayer(context_dim, hidden, scale=0)
        self.encoder_out = nn.Sequential(nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, settings.codes))
        self.decoder_in = nn.Linear(settings.codes, hidden)
        self.decoder_film = FiLMLayer(context_dim, hidden, scale=0)
        self.decoder_out = nn.Sequential(nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, pixels))
        self.code_prior = nn.Parameter(torch.zeros(settings.codes))  # uniform at the start
        self.register_buffer("meaning", torch.arange(settings.codes, dtype=torch.uint8))  # see `merge_codes`

    def patches(self, frames: Tensor) -> Tensor:
        """The patches (B, S, pixels * channels) float32, range -0.5..0.5, of pictures (B, H, W, channels) uint8; ValueError for
        pictures of another shape or kind."""
        if frames.shape[1:] != self.picture or frames.dtype != torch.uint8:
            raise ValueError(f"pictures must be (B, {self.picture}) uint8, not {tuple(frames.shape)} {frames.dtype}.")
        (rows, columns), patch, channels = self.grid, self.settings.patch, self.picture[2]
        patches = frames.view(-1, rows, patch, columns, patch, channels).transpose(2, 3)  # (B, rows, columns, p, p, ch)
        return patches.reshape(len(frames), rows * columns, -1).float().mul_(1 / 255).sub_(0.5)

    def logits(self, frames: Tensor, context: Tensor) -> Tensor:
        """Code logits (B, S, codes) of pictures (B, H, W, channels) uint8 under contexts (B, D); S patches."""
        x = self.patches(frames)
        return self.encoder_out(self.encoder_film(self.encoder_in(x), context))

    @torch.no_grad()
    def encode(self, frames: Tensor, context: Tensor) -> Tensor:
        """The likeliest codes (B, S) uint8 of pictures (B, H, W, channels) uint8 under contexts (B, D)."""
        return self.meaning[self.logits(frames, context).argmax(-1)]

    def decode(self, codes: Tensor, context: Tensor) -> Tensor:
        """Pictures (B, H, W, channels) float32, range 0..1, of codes (B, S) uint8 under contexts (B, D)."""
        one_hot = F.one_hot(codes.long(), self.settings.codes).float()
        patches = self._decode_patches(one_hot, context) + 0.5
        (rows, columns), patch, channels = self.grid, self.settings.patch, self.picture[2]
        patches = patches.view(-1, rows, columns, patch, patch, channels).transpose(2, 3)  # (B, rows, p, columns, p, ch)
        return patches.reshape(-1, *self.picture)

    def loss(self, frames: Tensor, context: Tensor) -> dict[str, Tensor]:
        """The negative evidence lower bound, in nats a picture, mean over the batch.

            E_{z ~ q(z|x, c)} -log p(x|z, c) + KL(q(z|x, c) || p(z))

        with p(x|z, c) Gaussian of fixed deviation (its constant left out), summed over pixels, and the KL summed over
        patches. A patch has few codes, so the expectation is an exact sum over them: no sample is drawn, no gradient estimated,
        and the decoder works once a code instead of once a patch. p(z) is one categorical for all patches: uniform at the start
        and learnt, because under a uniform prior the bound gains by spreading the background over several codes that mean the same.

        Args:
            frames: (B, H, W, channels) uint8.
            context: (B, D) float32; whatever made it learns along unless it is detached.

        Returns:
            scalars by name: reconstruction, kl; their sum is the bound.
        """
        log_q = self.logits(frames, context).log_softmax(-1)  # (B, S, codes)
        q = log_q.exp()
        square = (q * self._square_errors(frames, context)).sum((1, 2))
        divergence = (q * (log_q - self.code_prior.log_softmax(-1))).sum((1, 2))
        return {"reconstruction": square.mean() / (2 * self.settings.deviation**2), "kl": divergence.mean()}

    @torch.no_grad()
    def seed_codes(self, frames: Tensor, context: Tensor) -> int:
        """Give each clearly different kind of patch a code of its own before training; returns how many were found.

        Training alone often merges two kinds of patch into one code and stays there. So the encoder's
        last layer begins as the posterior of a mixture of Gaussians around centres found by farthest-first traversal
        and k-means in its random features (the remedy for codebook collapse in vector quantisation: k-means seeding,
        Arthur & Vassilvitskii 2007). Codes without a centre begin improbable everywhere.

        Args:
            frames: (B, H, W, channels) uint8, a sample of what will be seen; context: (B, D).
        """
        hidden = self.encoder_out[:-1](self.encoder_film(self.encoder_in(self.patches(frames)), context)).flatten(0, 1)
        centres = hidden.mean(0, keepdim=True)
        reach = torch.cdist(hidden, centres).amax()
        for _ in range(self.settings.codes):
            distance, farthest = torch.cdist(hidden, centres).amin(1).max(0)
            if len(centres) == self.settings.codes or distance <= reach * self.settings.alike:
                break
            centres = torch.cat([centres, hidden[farthest][None]])
        for _ in range(10):
            member = F.one_hot(torch.cdist(hidden, centres).argmin(1), len(centres)).float()
            share = member.mean(0)
            centres = torch.where(share[:, None] > 0, member.T @ hidden / member.sum(0).clamp_min(1)[:, None], centres)
        found = len(centres)
        spread = torch.pdist(centres).amin() ** 2 / 16 if found > 1 else torch.ones((), device=hidden.device)
        last = self.encoder_out[-1]
        middle = centres.mean(0).expand(self.settings.codes - found, -1)
        everywhere = torch.cat([centres, middle])
        last.weight.copy_(everywhere / spread)
        last.bias.copy_(-everywhere.square().sum(1) / (2 * spread))
        last.bias[:found] += share.clamp_min(1e-4).log()
        last.bias[found:] -= 10
        return found

    @torch.no_grad()
    def merge_codes(self, frames: Tensor, context: Tensor, tolerance: float = 0.5) -> int:
        """Let codes that stand for the same kind of patch count as one from now on; returns how many have gone.

        Where worlds look different, one kind of patch may have one code under some contexts and another under others, and
        flicker between them in the middle. Such codes are known by their decoder: the patches of the rarer one can be
        rebuilt by the other, under their own contexts, almost as well. Each goes to the most frequent such code.

        Args:
            frames: (B, H, W, channels) uint8, a sample of what will be seen; context: (B, D).
            tolerance: nats that an exchange may cost, for each number in a patch.
        """
        codes = self.logits(frames, context).argmax(-1)
        cost = self._square_errors(frames, context) / (2 * self.settings.deviation**2)
        cost = cost - cost.gather(2, codes[..., None])  # (B, S, codes): of calling a patch by another code
        member = F.one_hot(codes, self.settings.codes).float().flatten(0, 1)
        count = member.sum(0)
        exchange = member.T @ cost.flatten(0, 1) / count.clamp_min(1)[:, None]  # (codes, codes)
        alike = (exchange < tolerance * self.encoder_in.in_features) & (count >= count[:, None])  # the rarer goes
        meaning = torch.where(alike, count, -1).argmax(1).where(count > 0, self.meaning.long())
        for _ in range(len(count)):  # a code whose better name has a better name itself
            meaning = meaning[meaning]
        self.meaning.copy_(meaning)
        return len(count) - len(meaning.unique())

    def _square_errors(self, frames: Tensor, context: Tensor) -> Tensor:
        """Squared errors (B, S, codes), summed over a patch, if patches were rebuilt from each of the codes."""
        patches, every = self.patches(frames), torch.eye(self.settings.codes, device=frames.device)
        rebuilt = self._decode_patches(every.expand(len(frames), -1, -1), context)  # (B, codes, P)
        cross = patches @ rebuilt.transpose(1, 2)
        return patches.square().sum(-1, keepdim=True) - 2 * cross + rebuilt.square().sum(-1)[:, None]

    def _decode_patches(self, one_hot: Tensor, context: Tensor) -> Tensor:
        return self.decoder_out(self.decoder_film(self.decoder_in(one_hot), context))  # (B, S, pixels of a patch)


class Value(nn.Module):
    """What a state is worth under a belief, V(z, c), and what a fresh episode is worth, W(c).

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

    def fresh(self, pooled: Tensor) -> Tensor:
        """W (B,): the value of beginning an episode under pooled contexts (B, 128)."""
        return self.fresh_out(pooled)[:, 0]


# ------------------------------------------------------------------------------------------------------------ planning


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
