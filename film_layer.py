"""Feature-wise linear modulation: the one place where the context touches a model.

Source: Perez et al., "FiLM: Visual Reasoning with a General Conditioning Layer", AAAI 2018.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FiLMLayer(nn.Module):
    """Scale and shift features by a linear function of the context: `(1 + gamma(c)) * x + beta(c)`.

    The weights of the modulated model stay as they are: only gamma and beta follow the context. With `scale=0` the
    layer begins as the identity for every context.

    Args:
        context_dim: size D of the context, at least 1.
        feature_dim: number F of features, at least 1.
        scale: factor on PyTorch's initial generator weights, at least 0; the bias begins at 0.

    Raises:
        ValueError: a size below 1 or a negative scale; at a call, shapes that do not fit.
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
        """Modulate features (B, F), (B, N, F) or (B, F, H, W), float, by context (B, D), or (B, N, D) for (B, N, F).

        With `row` (B,) int64 contexts may be fewer: features i are modulated by context[row[i]], and gamma and beta of each are
        computed once. Returns the modulated features in the shape of `features`.
        """
        modulation = self.generator(context)
        if row is not None:
            modulation = modulation.index_select(0, row)
        gamma, beta = modulation.chunk(2, -1)
        if features.ndim == 4:
            channels, gamma, beta = features.shape[1], gamma[:, :, None, None], beta[:, :, None, None]
        else:
            channels = features.shape[-1]
            if features.ndim == 3 and context.ndim == 2:
                gamma, beta = gamma[:, None], beta[:, None]
        if channels != self.feature_dim or gamma.ndim != features.ndim:
            raise ValueError(
                f"FiLMLayer modulates (B, {self.feature_dim}), (B, N, {self.feature_dim}) or (B, {self.feature_dim}, H, W) "
                f"by (B, D), not {tuple(features.shape)} by {tuple(context.shape)}."
            )
        return torch.addcmul(beta, features, 1 + gamma)
