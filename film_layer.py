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

    def modulation(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Scale 1 + gamma(c) and shift beta(c), (..., F) each, under contexts (..., D); see `modulate`."""
        gamma, beta = self.generator(context).chunk(2, -1)
        return 1 + gamma, beta

    def forward(self, features: Tensor, context: Tensor) -> Tensor:
        """Modulate features (B, F), (B, N, F) or (B, F, H, W), float, by contexts (B, D), or (B, N, D) for (B, N, F).

        A single context, (1, D), is that of all features. Returns a tensor of the shape of `features`.
        """
        F, D, shape = self.feature_dim, self.generator.in_features, features.shape
        leading = shape[:1] if context.ndim == 2 else shape[:2]  # what contexts may differ in
        fits = (shape[1] if len(shape) == 4 else shape[-1]) == F and context.shape[-1] == D
        fits &= context.ndim == 2 or context.ndim == len(shape) == 3
        if not fits or context.shape[0] != 1 and context.shape[:-1] != leading:
            expected = f"features (B, {F}), (B, N, {F}) or (B, {F}, H, W) and contexts (B, {D})"
            raise ValueError(f"FiLMLayer needs {expected}, not {tuple(shape)} and {tuple(context.shape)}.")
        scale, shift = self.modulation(context)
        if len(shape) == 4:
            scale, shift = scale[:, :, None, None], shift[:, :, None, None]
        elif len(shape) == 3 and context.ndim == 2:
            scale, shift = scale[:, None], shift[:, None]
        return modulate(features, scale, shift)


def modulate(features: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`scale * features + shift`, for what many features share; all three are broadcast."""
    return torch.addcmul(shift, features, scale)
