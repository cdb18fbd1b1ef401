"""Perception: a variational autoencoder that turns pictures into grids of categorical codes and back, modulated by the context.

Each patch of the picture becomes one categorical code, so that all later inference and planning work on small integer
grids. Source: Kingma & Welling, "Auto-Encoding Variational Bayes", 2014.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from film_layer import FiLMLayer
from memory import require_all


@dataclass(frozen=True)
class VAESettings:
    """Perception."""

    patch: int = 0
    """Pixels along each side of a patch, which must divide the picture; 0 stands for a cell of the world."""
    num_codes: int = 6
    """Number of categories of a patch, 2 to 255."""
    width: int = 32
    """Hidden features of encoder and decoder, at least 1."""
    cluster_radius: float = 0.5
    """Patches nearer than this share of the largest distance begin with one code, in [0, 1]: what noise is taken to do."""
    obs_std: float = 0.1
    """Standard obs_std of a pixel around its reconstruction, as a share of the range, above 0."""
    decoder_lr: float = 1e-2
    """Adam's learning rate of the decoder while perception is learnt alone."""
    encoder_lr: float = 2e-4
    """That of the encoder: slow, because an untrained decoder would pull its well-begun codes together."""
    final_lr_scale: float = 1.0
    """Meanwhile these rates fall evenly to this share of their beginning, in [0, 1]."""
    late_lr: float = 3e-5
    """Adam's learning rate of both from then on."""

    def __post_init__(self) -> None:
        require_all(
            "vae", self, patch=(0, 64), num_codes=(2, 255), width=(1, 4096), cluster_radius=(0, 1), obs_std=(1e-3, 10),
            decoder_lr=(0, 1), encoder_lr=(0, 1), final_lr_scale=(0, 1), late_lr=(0, 1),
        )  # fmt: skip


class VAE(nn.Module):
    """A variational autoencoder with one categorical code for each patch; encoder and decoder are FiLM-modulated.

    Args:
        settings: see `VAESettings`.
        obs_shape: (height, width, channels) of the pictures.
        context_dim: size D of the context vector that modulates it.

    Raises:
        ValueError: the patch does not divide the picture.
    """

    def __init__(self, settings: VAESettings, obs_shape: tuple[int, int, int], context_dim: int) -> None:
        super().__init__()
        height, width, channels = obs_shape
        patch, hidden = settings.patch, settings.width
        if patch < 1:
            raise ValueError("vae.patch is 0, so the size of a cell must be put in its place before a VAE is built.")
        if height % patch or width % patch:
            raise ValueError(
                f"vae.patch is {patch}, which does not divide a picture of {height}x{width}: "
                f"choose a common divisor, such as {math.gcd(height, width)}."
            )
        self.settings, self.obs_shape, self.grid = settings, obs_shape, (height // patch, width // patch)
        pixels = patch * patch * channels
        self.encoder_in = nn.Linear(pixels, hidden)
        self.encoder_film = FiLMLayer(context_dim, hidden, scale=0)
        self.encoder_out = nn.Sequential(nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, settings.num_codes))
        self.decoder_in = nn.Linear(settings.num_codes, hidden)
        self.decoder_film = FiLMLayer(context_dim, hidden, scale=0)
        self.decoder_out = nn.Sequential(nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, pixels))
        self.code_prior = nn.Parameter(torch.zeros(settings.num_codes))  # uniform at the start
        self.register_buffer("code_alias", torch.arange(settings.num_codes, dtype=torch.uint8))  # see `merge_codes`

    def patches(self, frames: Tensor) -> Tensor:
        """The patches (B, S, pixels * channels) float32, range -0.5..0.5, of pictures (B, H, W, channels) uint8; ValueError for
        pictures of another shape or kind."""
        if frames.shape[1:] != self.obs_shape or frames.dtype != torch.uint8:
            raise ValueError(f"pictures must be (B, {self.obs_shape}) uint8, not {tuple(frames.shape)} {frames.dtype}.")
        (rows, columns), patch, channels = self.grid, self.settings.patch, self.obs_shape[2]
        patches = frames.view(-1, rows, patch, columns, patch, channels).transpose(2, 3)  # (B, rows, columns, p, p, ch)
        return patches.reshape(len(frames), rows * columns, -1).float().mul_(1 / 255).sub_(0.5)

    def logits(self, frames: Tensor, context: Tensor) -> Tensor:
        """Code logits (B, S, codes) of pictures (B, H, W, channels) uint8 under contexts (B, D); S patches."""
        x = self.patches(frames)
        return self.encoder_out(self.encoder_film(self.encoder_in(x), context))

    @torch.no_grad()
    def encode(self, frames: Tensor, context: Tensor) -> Tensor:
        """The likeliest codes (B, S) uint8 of pictures (B, H, W, channels) uint8 under contexts (B, D)."""
        return self.code_alias[self.logits(frames, context).argmax(-1)]

    def decode(self, codes: Tensor, context: Tensor) -> Tensor:
        """FrameBlock (B, H, W, channels) float32, range 0..1, of codes (B, S) uint8 under contexts (B, D)."""
        one_hot = F.one_hot(codes.long(), self.settings.num_codes).float()
        patches = self._decode_patches(one_hot, context) + 0.5
        (rows, columns), patch, channels = self.grid, self.settings.patch, self.obs_shape[2]
        patches = patches.view(-1, rows, columns, patch, patch, channels).transpose(2, 3)  # (B, rows, p, columns, p, ch)
        return patches.reshape(-1, *self.obs_shape)

    def loss(self, frames: Tensor, context: Tensor) -> dict[str, Tensor]:
        """The negative evidence lower bound, in nll a picture, mean over the batch.

            E_{z ~ q(z|x, c)} -log p(x|z, c) + KL(q(z|x, c) || p(z))

        with p(x|z, c) Gaussian of fixed obs_std (its constant left out), summed over pixels, and the KL summed over
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
        return {"reconstruction": square.mean() / (2 * self.settings.obs_std**2), "kl": divergence.mean()}

    @torch.no_grad()
    def init_codes_kmeans(self, frames: Tensor, context: Tensor) -> int:
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
        for _ in range(self.settings.num_codes):
            distance, farthest = torch.cdist(hidden, centres).amin(1).max(0)
            if len(centres) == self.settings.num_codes or distance <= reach * self.settings.cluster_radius:
                break
            centres = torch.cat([centres, hidden[farthest][None]])
        for _ in range(10):
            member = F.one_hot(torch.cdist(hidden, centres).argmin(1), len(centres)).float()
            share = member.mean(0)
            centres = torch.where(share[:, None] > 0, member.T @ hidden / member.sum(0).clamp_min(1)[:, None], centres)
        found = len(centres)
        spread = torch.pdist(centres).amin() ** 2 / 16 if found > 1 else torch.ones((), device=hidden.device)
        last = self.encoder_out[-1]
        middle = centres.mean(0).expand(self.settings.num_codes - found, -1)
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
            tolerance: nll that an exchange may cost, for each number in a patch.
        """
        codes = self.logits(frames, context).argmax(-1)
        cost = self._square_errors(frames, context) / (2 * self.settings.obs_std**2)
        cost = cost - cost.gather(2, codes[..., None])  # (B, S, codes): of calling a patch by another code
        member = F.one_hot(codes, self.settings.num_codes).float().flatten(0, 1)
        count = member.sum(0)
        exchange = member.T @ cost.flatten(0, 1) / count.clamp_min(1)[:, None]  # (codes, codes)
        alike = (exchange < tolerance * self.encoder_in.in_features) & (count >= count[:, None])  # the rarer goes
        meaning = torch.where(alike, count, -1).argmax(1).where(count > 0, self.code_alias.long())
        for _ in range(len(count)):  # a code whose better name has a better name itself
            meaning = meaning[meaning]
        self.code_alias.copy_(meaning)
        return len(count) - len(meaning.unique())

    def _square_errors(self, frames: Tensor, context: Tensor) -> Tensor:
        """Squared errors (B, S, codes), summed over a patch, if patches were rebuilt from each of the codes."""
        patches, every = self.patches(frames), torch.eye(self.settings.num_codes, device=frames.device)
        rebuilt = self._decode_patches(every.expand(len(frames), -1, -1), context)  # (B, codes, P)
        cross = patches @ rebuilt.transpose(1, 2)
        return patches.square().sum(-1, keepdim=True) - 2 * cross + rebuilt.square().sum(-1)[:, None]

    def _decode_patches(self, one_hot: Tensor, context: Tensor) -> Tensor:
        return self.decoder_out(self.decoder_film(self.decoder_in(one_hot), context))  # (B, S, pixels of a patch)
