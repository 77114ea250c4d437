"""Scores a share of a split: input, gamma correction, and a checkpoint's student and averaged student."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from iaml import AutoEncoder, NetworkSettings, enhance, score
from iaml.metrics import Protocol, eight_bit_levels
from pipeline.checkpoint import load_candidates
from pipeline.data.manifest import Manifest, PairRecord
from pipeline.data.pairs import read_pair
from pipeline.evaluation.perceptual import Lpips, LpipsUnavailable, find_backbone
from pipeline.evaluation.settings import EvaluationSettings

METHODS = ("input", "gamma", "student", "averaged")
Pixels = NDArray[np.uint8]
Enhancer = Callable[[Tensor], Tensor]


def fit_gamma(manifest: Manifest) -> float:
    """The exponent that best turns the mean luminance of dark images into that of their clean ones.

    Least squares in the logarithm, over the training pairs, so that no scored image takes part.
    """
    table = manifest.pair_table(["split", "low_luminance", "high_luminance"])
    training = table.filter(pc.equal(table["split"], "train"))
    low, clean = (np.log(training[name].to_numpy().clip(1 / 255, 1)) for name in ("low_luminance", "high_luminance"))
    return float(low @ clean / max(low @ low, 1e-12))


class Scorer:
    """Holds a share of a split, decoded, and the LPIPS net; scores one checkpoint after another.

    Args:
        url: the data set.
        records: this scorer's share.
        network: of the checkpoints.
        settings: protocol and LPIPS backbone.
        gamma: exponent of the gamma correction.
        device: where to run.
    """

    def __init__(
        self,
        url: str,
        records: Sequence[PairRecord],
        network: NetworkSettings,
        settings: EvaluationSettings,
        gamma: float,
        device: str = "cpu",
    ) -> None:
        self._pairs = {record.key: read_pair(url, record) for record in records}
        self._network = network
        self._protocol: Protocol = settings.protocol
        self._gamma = gamma
        self._device = device
        self._lpips, self._lpips_note = load_lpips(settings, device)
        self._baselines: list[dict[str, Any]] = []

    def lpips_note(self) -> dict[str, str]:
        """Which backbone scores LPIPS, or why none does."""
        return self._lpips_note

    def score(self, checkpoint: str) -> list[dict[str, Any]]:
        """The scores of each image by each method: ``key``, ``method``, ``psnr`` (dB), ``ssim``, ``lpips``."""
        if not self._baselines:
            self._baselines = self._score_all({"input": lambda low: low, "gamma": lambda low: low**self._gamma})
        candidates = load_candidates(checkpoint, self._network)
        return self._baselines + self._score_all({name: self._runner(net) for name, net in candidates.items()})

    def pictures(self, checkpoint: str, keys: Sequence[str]) -> dict[str, list[Pixels]]:
        """Low-light, gamma-corrected, enhanced and clean images of those ``keys`` that are in this share."""
        run = self._runner(load_candidates(checkpoint, self._network)["student"])
        pictures = {}
        for key in (key for key in keys if key in self._pairs):
            low, clean = self._images(key)
            pictures[key] = [_pixels(image) for image in (low, low**self._gamma, run(low), clean)]
        return pictures

    def _runner(self, network: AutoEncoder) -> Enhancer:
        network.to(self._device)
        return lambda low: enhance(network, low)

    def _images(self, key: str) -> tuple[Tensor, Tensor]:
        low, clean = (
            torch.from_numpy(image.copy()).permute(2, 0, 1)[None].to(self._device) / 255 for image in self._pairs[key]
        )
        return low, clean

    def _score_all(self, methods: dict[str, Enhancer]) -> list[dict[str, Any]]:
        return [self._score_one(key, name, run) for name, run in methods.items() for key in self._pairs]

    def _score_one(self, key: str, method: str, run: Enhancer) -> dict[str, Any]:
        low, clean = self._images(key)
        enhanced = run(low)
        scores = score(enhanced, clean, self._protocol)
        if self._lpips:
            scores["lpips"] = self._lpips(enhanced, clean)
        return {"key": key, "method": method, **{name: float(value) for name, value in scores.items()}}


def load_lpips(settings: EvaluationSettings, device: str) -> tuple[Lpips | None, dict[str, str]]:
    """The LPIPS net that the settings ask for with a note of its origin, or none with the reason."""
    if settings.lpips == "none":
        return None, {"missing": "turned off by evaluation.lpips"}
    try:
        weights = find_backbone(settings.lpips, settings.lpips_weights)
        net = Lpips(weights, device)
    except LpipsUnavailable as reason:
        return None, {"missing": str(reason)}
    return net, {"backbone": weights.backbone, "source": weights.source, "sha256": weights.sha256}


def summarise(images: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Means over the images by method and metric."""
    methods: dict[str, dict[str, float]] = {}
    for method in METHODS:
        rows = [image for image in images if image["method"] == method]
        metrics = [name for name in rows[0] if name not in ("key", "method")] if rows else []
        methods[method] = {name: float(np.mean([row[name] for row in rows])) for name in metrics}
    return methods


def _pixels(image: Tensor) -> Pixels:
    return eight_bit_levels(image[0]).permute(1, 2, 0).to(torch.uint8).cpu().numpy()
