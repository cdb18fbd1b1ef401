"""The VAE, from observations to grids of categorical codes and back, and the value of such grids; below them, the
scores and figures of rollouts.

Each patch of a frame becomes one categorical code, so that inference and planning work on grids of small integers.
Source: Kingma & Welling, "Auto-Encoding Variational Bayes", 2014.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from film_layer import FiLMLayer, modulate
from memory import require_all
from transition_model import ABSENT, TransitionModel, change_keys, one_hot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage


@dataclass(frozen=True)
class VAESettings:
    """Perception."""

    patch: int = 0  # side of a patch in pixels, which must divide the frame; 0 for the size of a cell
    num_codes: int = 6  # categories of a patch, 2 to 255
    width: int = 32  # hidden features of encoder and decoder, at least 1
    obs_std: float = 0.1  # standard deviation of a pixel around its reconstruction, as a share of the range, above 0
    decoder_lr: float = 1e-2  # Adam's learning rate of the decoder while perception is trained alone, in [0, 1]
    # the same of the encoder after a warm-up, in [0, 1]; it learns only where an appearance is inferred, or training
    # would merge codes
    encoder_lr: float = 5e-4
    final_lr_scale: float = 1.0  # in that phase all rates of perception fall linearly to this share, in [0, 1]
    late_lr: float = 3e-5  # all rates of perception after that phase, in [0, 1]

    def __post_init__(self) -> None:
        require_all("vae", self, patch=(0, 64), num_codes=(2, 255), width=(1, 4096))
        require_all("vae", self, obs_std=(1e-3, 10), decoder_lr=(0, 1), encoder_lr=(0, 1), late_lr=(0, 1))
        require_all("vae", self, final_lr_scale=(0, 1))


class VAE(nn.Module):
    """A variational autoencoder with one categorical code per patch; encoder and decoder are FiLM-modulated.

    FiLM begins as the identity. `Learner` trains the encoder, its FiLM too, only where an appearance is inferred.

    In the shapes below, a frame (H, W, channels) has S patches of P = patch * patch * channels numbers.

    Args:
        settings: see `VAESettings`; `patch` must not be 0 here.
        obs_shape: (H, W, channels) of the frames.
        context_dim: size D of the context vector.

    Raises:
        ValueError: the patch is 0 or does not divide the frame.
    """

    def __init__(self, settings: VAESettings, obs_shape: tuple[int, int, int], context_dim: int) -> None:
        super().__init__()
        height, width, channels = obs_shape
        patch, hidden, num_codes = settings.patch, settings.width, settings.num_codes
        if patch < 1:
            raise ValueError("vae.patch is 0, but a VAE needs the size in pixels: set it, for example to world.cell.")
        if height % patch or width % patch:
            raise ValueError(
                f"vae.patch is {patch}, which does not divide a frame of {height}x{width}: "
                f"choose a common divisor, such as {math.gcd(height, width)}."
            )
        self.settings, self.obs_shape, self.context_dim = settings, obs_shape, context_dim
        self.grid = (height // patch, width // patch)
        self.encoder_in = nn.Linear(patch * patch * channels, hidden)
        self.encoder_film = FiLMLayer(context_dim, hidden, scale=0)
        self.encoder_out = nn.Sequential(nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, num_codes))
        self.decoder_in = nn.Linear(num_codes, hidden)
        self.decoder_film = FiLMLayer(context_dim, hidden, scale=0)
        self.decoder_out = nn.Sequential(
            nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, patch * patch * channels)
        )
        self.code_prior = nn.Parameter(torch.zeros(num_codes))  # logits, initially uniform

    def patches(self, frames: Tensor) -> Tensor:
        """The patches (B, S, P) float32, in -0.5..0.5, of frames (B, H, W, channels) uint8; ValueError as in `cut`."""
        return self.cut(frames).float().mul_(1 / 255).sub_(0.5)

    def cut(self, frames: Tensor) -> Tensor:
        """The patches (B, S, P) uint8 of frames (B, H, W, channels) uint8.

        Raises:
            ValueError: frames of another shape or dtype.
        """
        if frames.shape[1:] != self.obs_shape or frames.dtype != torch.uint8:
            expected = ", ".join(map(str, self.obs_shape))
            raise ValueError(f"frames must be (B, {expected}) uint8, not {tuple(frames.shape)} {frames.dtype}.")
        (rows, columns), patch, channels = self.grid, self.settings.patch, self.obs_shape[2]
        patches = frames.view(-1, rows, patch, columns, patch, channels).transpose(2, 3)  # (B, rows, columns, p, p, ch)
        return patches.reshape(len(frames), rows * columns, -1)

    def logits(self, frames: Tensor, context: Tensor) -> Tensor:
        """Code logits (B, S, num_codes) of frames (B, H, W, channels) uint8 under contexts (B, D)."""
        return self.patch_logits(self.patches(frames), context)

    def patch_logits(self, patches: Tensor, context: Tensor) -> Tensor:
        """Code logits (B, S, num_codes) of patches (B, S, P), in -0.5..0.5, under contexts (B, D)."""
        return self.encoder_out(self.encoder_film(self.encoder_in(patches), context))

    @torch.no_grad()
    def encode(self, frames: Tensor, context: Tensor) -> Tensor:
        """The most likely codes (B, S) uint8 of frames (B, H, W, channels) uint8 under contexts (B, D)."""
        return self.encode_patches(self.patches(frames), context)

    @torch.no_grad()
    def encode_patches(self, patches: Tensor, context: Tensor) -> Tensor:
        """The same of patches (B, S, P) float32."""
        return self.patch_logits(patches, context).max(-1).indices.to(torch.uint8)  # faster than `argmax`

    def decode(self, codes: Tensor, context: Tensor) -> Tensor:
        """Frames (B, H, W, channels) float32, approximately in 0..1, of codes (B, S) uint8 under contexts (B, D)."""
        patches = self._decode_patches(one_hot(codes, self.settings.num_codes), context) + 0.5
        (rows, columns), patch, channels = self.grid, self.settings.patch, self.obs_shape[2]
        patches = patches.view(-1, rows, columns, patch, patch, channels).transpose(2, 3)
        return patches.reshape(-1, *self.obs_shape)  # from (B, rows, p, columns, p, channels)

    def loss(self, frames: Tensor, context: Tensor) -> dict[str, Tensor]:
        """The negative evidence lower bound in nats per frame, mean over the batch.

            L = E_{z ~ q(z|x, c)} -log p(x|z, c) + KL(q(z|x, c) || p(z))

        p(x|z, c) is Gaussian with the fixed deviation `obs_std` (its constant is left out) and summed over pixels; the
        KL is summed over patches. The expectation is an exact sum over the few codes of a patch: nothing is sampled, no
        gradient is estimated, and the decoder runs once per code instead of once per patch. p(z) is one categorical for
        all patches, initially uniform and learned: under a uniform prior the bound would improve by spreading the
        background over several codes of the same meaning.

        Args:
            frames: (B, H, W, channels) uint8.
            context: (B, D) float32; gradients reach whatever made it, unless it is detached.

        Returns:
            Scalars by name, reconstruction and kl, whose sum is L.
        """
        log_q = self.logits(frames, context).log_softmax(-1)  # (B, S, num_codes)
        q = log_q.exp()
        square_error = (q * self._square_errors(frames, context)).sum((1, 2))
        kl = (q * (log_q - self.code_prior.log_softmax(-1))).sum((1, 2))
        return {"reconstruction": square_error.mean() / (2 * self.settings.obs_std**2), "kl": kl.mean()}

    @torch.no_grad()
    def init_codes_kmeans(self, patches: Tensor) -> None:
        """Before training, give each kind of patch its own code, as far as there are enough codes.

        Training alone often merges two kinds of patch into one code and stays there. Therefore the last layer of the
        encoder is initialized as the posterior of a mixture of Gaussians. Its centres are found by k-means in the
        encoder's random features, from one patch of each kind. k-means seeding (Arthur & Vassilvitskii, 2007) is also
        the remedy for codebook collapse in vector quantization. Codes without a centre are initially improbable
        everywhere.

        Args:
            patches: (n, P) float32, in -0.5..0.5: a representative sample, or everything that differs.
        """
        num_codes = self.settings.num_codes
        kinds = kinds_of_patch(patches)[:num_codes]
        # FiLM is left out: initially it is the identity, whatever the context.
        features, centres = (self.encoder_out[:-1](self.encoder_in(x)) for x in (patches, kinds))

        # k-means; an empty cluster keeps its centre.
        found = len(centres)
        for _ in range(10):
            member = F.one_hot(torch.cdist(features, centres).argmin(1), found).float()  # (n, found)
            count = member.sum(0)[:, None]
            centres = torch.where(count > 0, member.T @ features / count.clamp_min(1), centres)

        # What is left is noise, which is made white; a little is added, because clean pictures have none.
        def closest(points: Tensor) -> Tensor:
            return torch.pdist(points).amin() ** 2 if found > 1 else torch.ones((), device=points.device)

        residual = (features - centres[torch.cdist(features, centres).argmin(1)]).double()
        covariance = residual.T @ residual / len(features)
        covariance.diagonal().add_(1e-4 * closest(centres))
        whiten = torch.linalg.inv(torch.linalg.cholesky(covariance)).float()
        centres = centres @ whiten.T

        # The logits of a mixture of Gaussians are linear in the features: (c . x - |c|^2 / 2) / variance. The variance
        # puts the two closest centres four standard deviations apart. Kinds count as equally frequent, for frequent
        # ones would else take the patches of rare ones.
        variance = closest(centres) / 16
        centres = torch.cat([centres, centres.mean(0).expand(num_codes - found, -1)])
        last = self.encoder_out[-1]
        last.weight.copy_(centres @ whiten / variance)
        last.bias.copy_(-centres.square().sum(1) / (2 * variance))
        last.bias[found:] -= 10

    @torch.no_grad()
    def drop_codes(self, frames: Tensor, context: Tensor, tolerance: float = 0.65) -> int:
        """Drop codes that the others can stand for, so that every kind of patch has one; they never occur again.

        Where environments differ in appearance, one kind of patch may have one code under some contexts and another
        under others, or several kinds share one more code under some. The decoder tells: the others reconstruct the
        patches of such a code almost as well. The rarest such code goes first. The encoder must then learn on, or it
        may give its patches to the wrong ones.

        Args:
            frames: (B, H, W, channels) uint8, a representative sample.
            context: (B, D).
            tolerance: largest increase of the negative log-likelihood, in nats per number in a patch.

        Returns:
            How many codes have been dropped.
        """
        codes = self.logits(frames, context).argmax(-1).flatten()  # (B * S,)
        nll = self._square_errors(frames, context).flatten(0, 1) / (2 * self.settings.obs_std**2)
        count, dropped = codes.bincount(minlength=self.settings.num_codes), 0
        while True:
            nll = nll.masked_fill(count == 0, math.inf)
            increase, other = (nll.scatter(1, codes[:, None], math.inf) - nll.gather(1, codes[:, None])).min(1)
            mean_increase = torch.zeros_like(nll[0]).index_add(0, codes, increase) / count
            redundant = mean_increase < tolerance * self.encoder_in.in_features
            if not redundant.any():
                return dropped
            rarest = int(count.where(redundant, len(codes) + 1).argmin())
            last, dropped = self.encoder_out[-1], dropped + 1
            last.weight[rarest], last.bias[rarest] = 0, ABSENT
            codes = torch.where(codes == rarest, other, codes)
            count = codes.bincount(minlength=len(count))

    def count_kinds(self, patches: Tensor) -> dict[str, Tensor]:
        """Metrics: the kinds of patch among patches (n, P) float32, and how many of them share a code with another."""
        kinds = kinds_of_patch(patches)[None]
        codes = self.encode_patches(kinds, torch.zeros(1, self.context_dim, device=patches.device))[0].long()
        shared = (codes.bincount()[codes] > 1).sum()
        return {"vae/kinds": torch.tensor(kinds.shape[1]), "vae/shared_codes": shared}

    def _square_errors(self, frames: Tensor, context: Tensor) -> Tensor:
        """Squared errors (B, S, num_codes), summed over a patch, of reconstructing each patch from each code."""
        patches = self.patches(frames)
        every_code = torch.eye(self.settings.num_codes, device=frames.device).expand(len(frames), -1, -1)
        rebuilt = self._decode_patches(every_code, context)  # (B, num_codes, P)
        cross = patches @ rebuilt.transpose(1, 2)
        return patches.square().sum(-1, keepdim=True) - 2 * cross + rebuilt.square().sum(-1)[:, None]

    def _decode_patches(self, one_hot: Tensor, context: Tensor) -> Tensor:
        """Patches (B, S, P) in -0.5..0.5 of one-hot codes (B, S, num_codes)."""
        return self.decoder_out(self.decoder_film(self.decoder_in(one_hot), context))


def distinct_patches(blocks: Iterable[Tensor], most: int = 2**14) -> Tensor:
    """Every different patch (n, P) uint8, sorted, of patches (B, S, P) uint8 on the CPU in blocks.

    Noise makes nearly all patches different: more than `most` are thinned out, and further blocks are not read.
    """
    found: set[bytes] = set()
    for patches in blocks:
        found.update(patch.tobytes() for patch in patches.flatten(0, 1).numpy())
        if len(found) > most:
            break
    every = sorted(found)[:: 1 + len(found) // most]
    return torch.stack([torch.frombuffer(bytearray(patch), dtype=torch.uint8) for patch in every])


def kinds_of_patch(patches: Tensor, most: int = 255) -> Tensor:
    """One patch of each kind (kinds, P), of patches (n, P) float32, by farthest-first traversal (Gonzalez, 1985).

    Of at most `most` patches each different one is its own kind. Of more, noise makes patches of one kind differ: two
    are of one kind if they are closer than three times the median distance of a patch to the one nearest to it.
    """
    radius = 0.0
    if len(patches) > most:
        distance = torch.cdist(patches[:: 1 + len(patches) // 512], patches)
        radius = 3 * float(distance.kthvalue(2, dim=1).values.median())  # the nearest one is the patch itself
    chosen = [int((patches - patches.mean(0)).norm(dim=1).argmax())]
    nearest = torch.full_like(patches[:, 0], math.inf)
    while len(chosen) < most:
        nearest = torch.minimum(nearest, (patches - patches[chosen[-1]]).norm(dim=1))
        if nearest.max() <= radius:
            break
        chosen.append(int(nearest.argmax()))
    return patches[chosen]


class ValueTerms(NamedTuple):
    """What the value reads of B contexts: computed once for all states under them."""

    of_codes: Tensor  # (B, C, 2 * keypoints)
    scale: Tensor  # (B, width)
    shift: Tensor  # (B, width)
    reset_value: Tensor  # (B,): W, the value of a new episode, where one terminates


class Value(nn.Module):
    """The value V(z, c) of a state under a context c, and W(c), of a new episode after one that terminates under c.

    Both are in units of reward. The state enters V through keypoints, as in the spatial softmax of Finn et al. (2016),
    with one change: attention is over the *codes* that are present, each at its mean position, and not over single
    patches. So the background, one code on most patches, does not outweigh the few objects, and the value starts to
    learn earlier. The rows of the actions enter through their mean, so relabelling the actions changes nothing.

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
        """The number of patches of every code, and the sum of their positions (y, x), each in -1..1: (B, C, 3) float32,
        of codes (B, S) uint8."""
        return one_hot(codes, self.codes).transpose(1, 2) @ self.place

    def read(self, context: Tensor) -> ValueTerms:
        """What the value reads of contexts (B, A + 1, D)."""
        actions = F.silu(self.action_in(context[:, :-1])).mean(1)
        pooled = torch.cat([actions, F.silu(self.world_in(context[:, -1]))], -1)  # (B, 2 * POOLED)
        of_codes = self.code_out(F.silu(self.code_film(self.code_features.expand(len(pooled), -1, -1), pooled)))
        return ValueTerms(of_codes, *self.state_film.modulation(pooled), self.reset_out(pooled)[:, 0])

    def forward(self, statistics: Tensor, terms: ValueTerms, row: Tensor | None = None) -> Tensor:
        """V (N,) of N states by `statistics` (N, C, 3) under B contexts, of which `row` (N,) int64 is each state's;
        without it N = B."""
        of_codes, scale, shift = terms[:3] if row is None else (term.index_select(0, row) for term in terms[:3])
        key, value = of_codes.chunk(2, -1)  # (N, C, P) each
        count, sums = statistics[..., :1], statistics[..., 1:]
        masked = key.masked_fill(count == 0, ABSENT)
        weight = (4 * masked).softmax(1)  # attention over the codes that are present
        points = weight.transpose(1, 2) @ (sums / count.clamp_min(1))  # (N, P, 2)
        state = torch.cat([points.flatten(1), masked.amax(1), (weight * value).sum(1)], -1)  # (N, 4 * P)
        state = F.silu(modulate(self.state_norm(self.state_in(state)), scale, shift))
        state = state + F.silu(self.state_hidden(state))
        return self.state_out(state)[:, 0]


class Trajectories(NamedTuple):
    """What happened in B lifetimes of T steps, on the CPU."""

    reward: Tensor  # (B, T) float32
    terminated: Tensor  # (B, T) bool
    truncated: Tensor  # (B, T) bool
    segment: Tensor  # (B, T) int64: index of the rule of the step


def bootstrap_ci(statistic: Callable[..., np.ndarray], *strata: np.ndarray) -> list[float | None]:
    """95% percentile bootstrap interval over lifetimes (after Agarwal et al., "Statistical Precipice", 2021).

    All runs see the same lifetimes, so each resample picks lifetimes, the same ones in every run: picked for each run
    apart, as theirs are, the interval would be too narrow.

    Args:
        statistic: reduces the last axis of k arrays (..., runs * n).
        strata: (k, n) for each run: k quantities of n lifetimes.

    Returns:
        low and high; None where the statistic is not finite, such as a ratio to nothing.
    """
    from scipy.stats import bootstrap  # half a second, in the end

    together = np.stack(strata, 1)  # (k, runs, n)

    def of_rows(rows: np.ndarray, axis: int) -> np.ndarray:
        sample = np.moveaxis(together[:, :, rows], 1, -2)  # (k, ..., runs, n)
        return statistic(*sample.reshape(*sample.shape[:-2], -1))

    options = dict(n_resamples=2000, batch=100, method="percentile", vectorized=True, rng=np.random.default_rng(0))
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings(action="ignore"):
        found = bootstrap([np.arange(together.shape[-1])], of_rows, **options).confidence_interval
    return [float(end) if np.isfinite(end) else None for end in (found.low, found.high)]


def mean(x: np.ndarray) -> np.ndarray:
    """Mean over the last axis."""
    return x.mean(-1)


def interquartile_mean(x: np.ndarray) -> np.ndarray:
    """IQM over the last axis: the mean of the middle half."""
    cut = x.shape[-1] // 4
    return np.partition(x, (cut, x.shape[-1] - cut - 1))[..., cut : x.shape[-1] - cut].mean(-1)


def ratio_of_means(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Ratio of two means over the last axis."""
    return x.mean(-1) / y.mean(-1)


def normalised(x: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Where the mean of x lies between those of low (0) and high (1)."""
    return (x.mean(-1) - low.mean(-1)) / (high.mean(-1) - low.mean(-1))


def probability_of_improvement(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Probability that x is above y in the same lifetime, a tie counting half."""
    return (x > y).mean(-1) + 0.5 * (x == y).mean(-1)


STATISTICS: dict[str, tuple[Callable[..., np.ndarray], str, tuple[str, ...]]] = {
    "return_mean": (mean, "returns", ("agent",)),
    "return_iqm": (interquartile_mean, "returns", ("agent",)),
    "normalised": (normalised, "returns", ("agent", "random", "known_rule")),
    "of_thompson": (ratio_of_means, "returns", ("agent", "thompson")),
    "probability_of_improvement": (probability_of_improvement, "returns", ("agent", "thompson")),
    "late_of_known_rule": (ratio_of_means, "late_returns", ("agent", "known_rule")),
}
"""How an agent compares with the references: the statistic, of which quantity of a lifetime, and of whom."""


def available_metrics(result: dict[str, Any]) -> list[str]:
    """Those of STATISTICS whose agents are in an evaluation; external environments have no exact solution."""
    return [name for name, (_, quantity, whose) in STATISTICS.items() if set(whose) <= set(result[quantity])]


def statistics(*results: dict[str, Any]) -> dict[str, Any]:
    """STATISTICS with their intervals, of one evaluation or of several runs' in the same environments together."""
    stats = {}
    for name in available_metrics(results[0]):
        statistic, quantity, whose = STATISTICS[name]
        strata = [np.array([result[quantity][agent] for agent in whose], float) for result in results]
        with np.errstate(divide="ignore", invalid="ignore"):
            value = float(statistic(*np.concatenate(strata, -1)))
        stats[name], stats[f"{name}_ci95"] = value if np.isfinite(value) else None, bootstrap_ci(statistic, *strata)
    return stats


def adaptation(trajectories: Trajectories) -> dict[str, Any]:
    """Mean return, and mean reward by step of the lifetime with its standard error."""
    reward = trajectories.reward.double()
    error = (reward.std(0) / len(reward) ** 0.5).tolist()
    return {"return_mean": float(reward.sum(1).mean()), "by_step": reward.mean(0).tolist(), "by_step_error": error}


def summary(trajectories: Trajectories) -> dict[str, Any]:
    """`adaptation`, interquartile mean of the returns, intervals of both means, and mean counts of goals, hazards and
    time-outs in a lifetime."""
    reward = trajectories.reward.double()
    returns, per_lifetime = reward.sum(1).numpy(), lambda happened: float(happened.double().sum(1).mean())
    return adaptation(trajectories) | {
        "return_iqm": float(interquartile_mean(returns)),
        "return_mean_ci95": bootstrap_ci(mean, returns[None]),
        "return_iqm_ci95": bootstrap_ci(interquartile_mean, returns[None]),
        "goals": per_lifetime(reward > 0),
        "hazards": per_lifetime(reward < 0),
        "timeouts": per_lifetime(trajectories.truncated),
    }


def belief_nll(agent: list[Tensor], exact: list[Tensor] | None, late: int = 16) -> dict[str, Any]:
    """Mean negative log-likelihood (nats) of each step, of the agent and of the exact filter, each from T tensors (B,).
    `late_excess` is the agent's mean minus the filter's from step `late` on, None without a filter. The agent's is of
    code grids, the filter's of positions, which determine each other: encoding errors count against the agent."""
    nll = {"agent": agent} | ({} if exact is None else {"exact": exact})
    nll = {name: torch.stack(steps).double().mean(1).tolist() for name, steps in nll.items()}
    late = min(late, len(agent) // 2)
    excess = None if exact is None else float(np.mean(nll["agent"][late:]) - np.mean(nll["exact"][late:]))
    return {**nll, "late": late, "late_excess": excess}


def compare(rollouts: dict[str, Trajectories]) -> dict[str, Any]:
    """Agents in the same lifetimes: a `summary` of each, `returns` and `late_returns` (of the last eighth of the steps)
    of every lifetime, and the agent's `statistics`."""
    late = -max(1, rollouts["agent"].reward.shape[1] // 8)
    result = {name: summary(one) for name, one in rollouts.items()} | {
        "returns": {name: one.reward.sum(1).tolist() for name, one in rollouts.items()},
        "late_returns": {name: one.reward[:, late:].sum(1).tolist() for name, one in rollouts.items()},
    }
    return result | statistics(result)


AGENTS = {"agent": "agent", "thompson": "Thompson sampling", "known_rule": "known rule", "random": "random"}


def format_ci(value: float | None, ends: Sequence[float | None], digits: int) -> str:
    """A figure with its 95% interval; a dash where there is none."""
    if None in (value, *ends):
        return "-" if value is None else f"{value:.{digits}f}"
    return f"{value:.{digits}f} [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"


def report(result: dict[str, Any]) -> str:
    """An evaluation in a few lines."""
    lines = [f"{result['lifetimes']} lifetimes on the {result['split']} split, return per lifetime [95% interval]:"]
    for name in (name for name in AGENTS if name in result):
        lines.append(f"  {name:18s} {format_ci(result[name]['return_mean'], result[name]['return_mean_ci95'], 2)}")
    for name in (name for name in available_metrics(result) if not name.startswith("return")):
        lines.append(f"  {name:18s} {format_ci(result[name], result[f'{name}_ci95'], 3)}")
    belief = result["belief_nll"]
    if belief["late_excess"] is not None:
        text = f"{belief['late_excess']:+.3f} nats a step over the exact filter from step {belief['late']} on"
        lines.append(f"  belief: {text}")
    return "\n".join(lines)


def plot_adaptation(results: Sequence[dict[str, Any]]) -> Figure:
    """Reward by step of the lifetime for every agent, averaged over evaluations; see `adaptation` and `plot_curve`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes, first = figure.subplots(), results[0]
    for name, label in AGENTS.items():
        if name in first:
            by_step = np.mean([result[name]["by_step"] for result in results], 0)
            error = np.sqrt(np.square([result[name]["by_step_error"] for result in results]).sum(0)) / len(results)
            returns = np.mean([result[name]["return_mean"] for result in results])
            plot_curve(axes, by_step, error, f"{label}: {returns:.2f}")
    if "lifetimes" in first:
        runs = f", {len(results)} runs" if len(results) > 1 else ""
        axes.set_title(f"{first['lifetimes']} lifetimes, {first['split']} tasks{runs}")
    axes.legend(title="return per lifetime", loc="lower right", fontsize="small")
    return figure


def plot_curve(axes: Any, by_step: Sequence[float], error: Sequence[float], label: str, bin_steps: int = 4) -> None:
    """Plot the reward by step, averaged over `bin_steps`, with the 95% interval that standard errors `error` give."""
    steps = len(by_step) // bin_steps * bin_steps
    binned = np.reshape(by_step[:steps], (-1, bin_steps)).mean(1)
    width = 1.96 * np.sqrt(np.square(error[:steps]).reshape(-1, bin_steps).sum(1)) / bin_steps
    middle = (np.arange(len(binned)) + 0.5) * bin_steps
    (line,) = axes.plot(middle, binned, label=label)
    axes.fill_between(middle, binned - width, binned + width, alpha=0.2, color=line.get_color())
    axes.set(xlabel="step of the lifetime", ylabel="reward a step")


def plot_learning(validations: Sequence[Sequence[float]]) -> Figure:
    """Held-out return over seconds and frames of training, from rows (update, frames, seconds, return and, where it is
    known, Thompson sampling's return); the seconds include those of validations before."""
    from matplotlib.figure import Figure

    _, frames, seconds, returns, *thompson = zip(*validations, strict=True)
    figure = Figure(figsize=(8, 3.5), dpi=120, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, x, label in zip(panels, (seconds, frames), ("seconds of training", "frames of training"), strict=True):
        axes.plot(x, returns, marker="o", label="agent, searching as when it collects")
        for level in thompson:
            axes.axhline(level[-1], color="tab:orange", label="Thompson sampling")
        axes.set(xlabel=label, xlim=(0, None), ylim=(min(0, *returns), None))
        axes.locator_params("x", nbins=5)
    panels[0].set_ylabel("return per lifetime, validation tasks")
    panels[0].legend(loc="lower right", fontsize="small")
    return figure


ARROWS = ("↖↑↗", "←·→", "↙↓↘")  # by rows down and columns to the right, from -1 to 1


class EffectPicture(NamedTuple):
    """What an effect changes, to be plotted instead of its number."""

    arrow: str  # which way something moves; a dot if nothing changes, empty if something changes but nothing moves
    colour: tuple[float, ...]  # (3,) in 0..1, of what moves
    patches: np.ndarray  # (h, w, 3) in 0..1: what changes, before and after; empty if nothing does


@torch.no_grad()
def picture_effects(vae: VAE, transition: TransitionModel, codes: Tensor, context: Tensor) -> list[EffectPicture]:
    """What every effect most often changes in grids (N, S) uint8, if it changes more than one of fifty; `context`
    (1, D) modulates the decoder."""
    pictures, columns = [], vae.grid[1]
    for after in transition.effects.predict(codes)[0].unbind(1):
        changed = after != codes
        first = changed.byte().argmax(1, keepdim=True).expand_as(codes)
        key = change_keys(codes, after, columns, first).sum(1)
        moves = key[key != 0]
        if 50 * len(moves) <= len(key):
            pictures.append(EffectPicture(ARROWS[1][1], (0, 0, 0), np.zeros((0, 0, 3))))
            continue
        example = int((key == moves.mode().values).nonzero()[0])
        pair = torch.stack([codes[example], after[example]])
        images = vae.decode(pair, context.expand(2, -1)).clamp(0, 1).cpu().numpy()
        tells = transition.telling.view(transition.codes, -1).diagonal().tolist()  # where it stays
        pictures.append(picture_change(images, pair.tolist(), vae.settings.patch, columns, tells))
    return pictures


def picture_change(
    images: np.ndarray, pair: list[list[int]], patch: int, columns: int, tells: list[bool]
) -> EffectPicture:
    """One change, from images (2, H, W, 3) in 0..1 and codes (2, S) before and after it; an arrow shows which way
    something went, which is a code that `tells` something."""
    before, after = pair
    at = [place for place in range(len(before)) if before[place] != after[place]]
    rows, across = zip(*(divmod(place, columns) for place in at), strict=True)
    ends = (slice(min(x) * patch, (max(x) + 1) * patch) for x in (rows, across))
    crop = images[:, *ends]
    patches = np.concatenate([crop[0], np.ones_like(crop[0][:, :1]), crop[1]], 1)
    for p, q in itertools.permutations(at, 2):
        if before[p] == after[q] and tells[before[p]]:
            (row, column), (to_row, to_column) = divmod(p, columns), divmod(q, columns)
            moves = images[0, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            arrow = ARROWS[np.sign(to_row - row) + 1][np.sign(to_column - column) + 1]
            return EffectPicture(arrow, tuple(moves.max((0, 1))), patches)
    return EffectPicture("", (0, 0, 0), patches)


def label_effects(axes: Axes, pictures: Sequence[EffectPicture]) -> None:
    """Name the columns of a picture of the belief: an arrow in the colour of what moves, else what changes."""
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage
    from matplotlib.patheffects import withStroke

    size = min(14.0, 180 / len(pictures))  # points
    axes.set_xticks(range(len(pictures)), [picture.arrow for picture in pictures], fontsize=size, weight="bold")
    axes.tick_params("x", length=0)
    for number, (label, picture) in enumerate(zip(axes.get_xticklabels(), pictures, strict=True)):
        label.set(color=picture.colour, path_effects=[withStroke(linewidth=0.6, foreground="0.3")])
        if not picture.arrow:
            image = OffsetImage(picture.patches, zoom=1.4 * size / max(picture.patches.shape))
            place = dict(xycoords=("data", "axes fraction"), box_alignment=(0.5, 1.2), frameon=False, pad=0)
            axes.add_artist(AnnotationBbox(image, (number, 0), **place))


class LifetimeFrame(NamedTuple):
    """One step of a lifetime."""

    obs: np.ndarray  # (H, W, 3)
    decoded: np.ndarray  # (H, W, 3) in 0..1: its reconstruction
    belief: np.ndarray  # (A, K): probability of every effect after every action
    values: np.ndarray  # (A,): what the planner expects of every action
    heading: str


@torch.no_grad()
def record_lifetime(agent: Any, world: Any) -> tuple[list[LifetimeFrame], list[EffectPicture]]:
    """Roll out a lifetime of an `AgentController` in a single environment: what happened, and what its effects are."""
    frames, seen, earned = [], [], 0.0
    agent.reset(world.reset())
    for step in range(world.settings.lifetime):
        action = agent.act()
        decoded = agent.vae.decode(agent.codes, agent.visual_context)[0].clamp(0, 1)
        belief = agent.transition.log_prior(agent.context[:, :-1])[0].exp()
        images = (x.cpu().numpy() for x in (agent.obs[0], decoded, belief, agent.values[0]))
        frames.append(LifetimeFrame(*images, f"step {step}   action {int(action)}   return {earned:+g}"))
        seen.append(agent.codes)
        happened = world.step(action)
        agent.observe(action, happened)
        earned += float(happened.reward)
    return frames, picture_effects(agent.vae, agent.transition, torch.cat(seen), agent.visual_context)


def plot_lifetime(frames: Sequence[LifetimeFrame], effects: Sequence[EffectPicture], columns: int = 5) -> Figure:
    """Observation, reconstruction and belief at some steps of a lifetime, one column each."""
    from matplotlib.figure import Figure

    shown = [round(x) for x in np.geomspace(1, len(frames), columns) - 1]
    figure = Figure(figsize=(2.6 * columns, 6.5), dpi=70)
    panels = figure.subplots(3, columns, squeeze=False, height_ratios=[2, 2, 1.2])
    figure.subplots_adjust(left=0.04, right=0.99, top=0.95, bottom=0.06, wspace=0.15, hspace=0.08)
    for frame, (obs, decoded, belief) in zip((frames[step] for step in shown), panels.T, strict=True):
        for axes, image in ((obs, frame.obs), (decoded, frame.decoded)):
            axes.imshow(image)
            axes.set(xticks=[], yticks=[])
        obs.set_title(frame.heading, fontsize="small")
        show_belief(belief, frame.belief, effects)
    for axes, label in zip(panels[:, 0], ("observation", "reconstruction", "action"), strict=True):
        axes.set_ylabel(label)
    return figure


def show_belief(axes: Axes, belief: np.ndarray, effects: Sequence[EffectPicture]) -> AxesImage:
    """Draw a belief (A, K), one row an action, one named column an effect."""
    label_effects(axes, effects)
    axes.set_yticks(range(len(belief)))
    return axes.imshow(belief, vmin=0, vmax=1, aspect="auto", cmap="magma")


def save_animation(
    frames: Sequence[LifetimeFrame], effects: Sequence[EffectPicture], caption: str, path: Path, fps: int
) -> None:
    """Write an animation, .gif or .mp4, atomically; ValueError for another ending, or where ffmpeg is missing."""
    import matplotlib
    from matplotlib import animation
    from matplotlib.figure import Figure

    if path.suffix not in (".gif", ".mp4"):
        raise ValueError(f"{path} ends neither in .gif nor in .mp4: choose one of them.")
    if path.suffix == ".mp4" and importlib.util.find_spec("imageio_ffmpeg"):  # an optional package with an ffmpeg
        import imageio_ffmpeg

        matplotlib.rcParams["animation.ffmpeg_path"] = imageio_ffmpeg.get_ffmpeg_exe()
    if path.suffix == ".mp4" and not animation.FFMpegWriter.isAvailable():
        raise ValueError("an MP4 needs ffmpeg: pip install imageio-ffmpeg, or name a file that ends in .gif.")
    figure = Figure(figsize=(6, 5.6), dpi=70)
    rows = [["obs", "obs", "decoded", "decoded"], ["belief", "belief", "belief", "values"]]
    parts = figure.subplot_mosaic(rows, height_ratios=[3, 1.5])
    figure.subplots_adjust(left=0.08, right=0.97, top=0.88, bottom=0.13, hspace=0.2, wspace=0.12)
    titles = {"obs": "observation", "decoded": "reconstruction", "belief": "belief: which effect each action has"}
    for name, title in (titles | {"values": "value"}).items():
        parts[name].set(title=title, xticks=[], yticks=[])
    images = [parts["obs"].imshow(frames[0].obs), parts["decoded"].imshow(frames[0].decoded)]
    images.append(show_belief(parts["belief"], frames[0].belief, effects))
    parts["belief"].set_ylabel("action")
    every = np.stack([frame.values for frame in frames])
    low, high = min(every.min(), 0), max(every.max(), 0)
    bars = parts["values"].barh(range(len(frames[0].values)), frames[0].values)
    parts["values"].set(xlim=(low, high if high > low else 1), ylim=parts["belief"].get_ylim())
    title = figure.suptitle("")
    figure.text(0.5, 0.02, caption, ha="center", fontsize="small")

    def show(frame: LifetimeFrame) -> None:
        for image, content in zip(images, frame[:3], strict=True):
            image.set_data(content)
        for bar, value in zip(bars, frame.values, strict=True):
            bar.set_width(value)
            bar.set_color("tab:green" if value == frame.values.max() else "tab:gray")
        title.set_text(frame.heading)

    film = animation.FuncAnimation(figure, show, frames, init_func=lambda: None, cache_frame_data=False)
    writer = animation.FFMpegWriter(fps=fps) if path.suffix == ".mp4" else animation.PillowWriter(fps=fps)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    film.save(temporary, writer=writer)
    temporary.replace(path)
