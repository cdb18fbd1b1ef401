"""FiLM, feature-wise linear modulation: the one way in which the context modulates a model.

Source: Perez et al., "FiLM: Visual Reasoning with a General Conditioning Layer", AAAI 2018.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FiLMLayer(nn.Module):
    """Scale and shift features by a linear function of the context: `(1 + gamma(c)) * x + beta(c)`.

    Only gamma and beta depend on the context; the weights of the modulated model are shared by all contexts. With
    `scale=0` the layer is initially the identity for every context.

    Args:
        context_dim: size D of the context, at least 1.
        feature_dim: number F of features, at least 1.
        scale: factor on PyTorch's initial weights of the generator, at least 0; its bias is initially 0.

    Raises:
        ValueError: a size below 1 or a negative scale; in a call, shapes that do not fit.
    """

    def __init__(self, context_dim: int, feature_dim: int, scale: float = 1.0) -> None:
        super().__init__()
        if context_dim < 1 or feature_dim < 1 or scale < 0:
            raise ValueError(
                f"FiLMLayer needs context_dim >= 1, feature_dim >= 1 and scale >= 0, "
                f"not {context_dim}, {feature_dim} and {scale}."
            )
        self.feature_dim = feature_dim
        self.generator = nn.Linear(context_dim, 2 * feature_dim)
        with torch.no_grad():
            self.generator.weight.mul_(scale)
            self.generator.bias.zero_()

    def forward(self, features: Tensor, context: Tensor, row: Tensor | None = None) -> Tensor:
        """Modulate features (B, F), (B, N, F) or (B, F, H, W), float, by contexts (B, D), or (B, N, D) for (B, N, F).

        With `row` (B,) int64, features[i] are modulated by context[row[i]], so that gamma and beta of shared contexts
        are computed once. Returns a tensor of the shape of `features`.
        """
        modulation = self.generator(context)
        if row is not None:
            modulation = modulation.index_select(0, row)
        gamma, beta = modulation.chunk(2, -1)
        channels = features.shape[1] if features.ndim == 4 else features.shape[-1]
        if features.ndim == 4:
            gamma, beta = gamma[:, :, None, None], beta[:, :, None, None]
        elif features.ndim == 3 and context.ndim == 2:
            gamma, beta = gamma[:, None], beta[:, None]
        if channels != self.feature_dim or gamma.ndim != features.ndim:
            F = self.feature_dim
            expected = f"features (B, {F}), (B, N, {F}) or (B, {F}, H, W) and contexts (B, D)"
            raise ValueError(f"FiLMLayer needs {expected}, not {tuple(features.shape)} and {tuple(context.shape)}.")
        return torch.addcmul(beta, features, 1 + gamma)
