"""The training objective: named terms and their weights."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from iaml.mirror import mirror_loss
from iaml.network import SCALES
from iaml.settings import Settings
from iaml.similarity import structural_similarity

TERMS: Mapping[str, str] = {
    "reconstruction": "Reconstruction loss",
    "ssim": "1 - SSIM",
    "mirror": "Mirror loss",
}  # each loss term by name, in words


class ObjectiveSettings(Settings):
    """The objective: reconstruction + ssim_weight (1 - SSIM) + mirror_weight IAML."""

    mirror_weight: float = Field(0.8, ge=0, description="weight lambda of the mirror loss; 0 trains without a teacher")
    scale_weights: tuple[float, ...] = Field(
        (1 / SCALES,) * SCALES,
        min_length=SCALES,
        max_length=SCALES,
        description=f"weights w_i of the mirror loss on the {SCALES} decoder scales, coarsest first",
    )
    beta: float = Field(0.6, ge=0, description="strength of the emphasis on dark places; 0 weighs all places alike")
    gamma: float = Field(1.0, gt=0, description="illumination exponent of the emphasis on dark places")
    reconstruction: Literal["charbonnier", "mse"] = Field(
        "charbonnier", description="reconstruction loss: mean sqrt(d^2 + 1e-6), or the mean squared error"
    )
    ssim_weight: float = Field(1.0, ge=0, description="weight of 1 - SSIM; 0 leaves it out")

    @model_validator(mode="after")
    def _every_field_has_an_effect(self) -> "ObjectiveSettings":
        if min(self.scale_weights) < 0:
            raise ValueError(f"scale_weights must not be negative: {list(self.scale_weights)}")
        if self.mirror_weight == 0:
            self._refuse_changes("mirror_weight is 0", "scale_weights", "beta", "gamma")
        elif sum(self.scale_weights) == 0:
            raise ValueError("scale_weights are all 0; to train without the mirror loss set mirror_weight to 0")
        if self.beta == 0:
            self._refuse_changes("beta is 0", "gamma")
        return self

    def _refuse_changes(self, reason: str, *names: str) -> None:
        for name in names:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no effect because {reason}; leave it at its default")


class Objective:
    """Turns predictions and features into named loss terms, in float32."""

    def __init__(self, settings: ObjectiveSettings) -> None:
        self.settings = settings
        self.weights = {"reconstruction": 1.0, "ssim": settings.ssim_weight, "mirror": settings.mirror_weight}

    def terms(
        self,
        prediction: Tensor,
        low: Tensor,
        clean: Tensor,
        student_maps: Sequence[Tensor],
        teacher_maps: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """The terms whose weight is not 0, unweighted.

        Args:
            prediction: the student's images in [0, 1], shape (B, 3, H, W).
            low: ``x``, of the same shape.
            clean: ``y``, of the same shape.
            student_maps: ``u_i``, coarsest first; not used when the mirror weight is 0.
            teacher_maps: ``t_i``, likewise.

        Returns:
            Float32 scalars by the names of ``TERMS``.
        """
        with torch.autocast(low.device.type, enabled=False):
            prediction, clean = prediction.float(), clean.float()
            terms = {"reconstruction": self._reconstruction(prediction, clean)}
            if self.settings.ssim_weight:
                terms["ssim"] = 1 - structural_similarity(prediction, clean, data_range=1.0).mean()
            if self.settings.mirror_weight:
                terms["mirror"] = mirror_loss(
                    student_maps,
                    teacher_maps,
                    low,
                    scale_weights=self.settings.scale_weights,
                    beta=self.settings.beta,
                    gamma=self.settings.gamma,
                )
        return terms

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """The weighted sum of the terms."""
        return torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()

    def _reconstruction(self, prediction: Tensor, clean: Tensor) -> Tensor:
        squared = (prediction - clean).square()
        if self.settings.reconstruction == "mse":
            return squared.mean()
        return (squared + 1e-6).sqrt().mean()
