"""Scores images one by one: input, gamma correction, a checkpoint's networks, or pictures made elsewhere."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any, TypeVar

import matplotlib
import numpy as np
import pyarrow.compute as pc
import ray
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from iaml import AutoEncoder, enhance, score
from iaml.metrics import eight_bit_levels
from pipeline.data.manifest import Manifest, load_manifest
from pipeline.data.pairs import PairPixels, read_pair
from pipeline.evaluation.failures import FAILURES, MachineError, cause_of
from pipeline.evaluation.lpips import Lpips
from pipeline.evaluation.lpips_weights import BackboneWeights, LpipsUnavailable, find_backbone
from pipeline.run.pictures import BRIGHTEST_ERROR, VIEWS
from pipeline.run.scores import Table, means
from pipeline.settings.evaluation import OVERLAP, PRECISION, EvaluationSettings, Split
from pipeline.telemetry import Telemetry

LIBRARIES = ", ".join(f"{name} {version(name)}" for name in ("torch", "lpips", "numpy", "pillow"))
WIDEST_VIEW = 640  # pixels
Pixels = NDArray[np.uint8]
Enhancer = Callable[[Tensor], Tensor]
Measure = Callable[[Tensor, Tensor], dict[str, Tensor]]
Row = dict[str, Any]
Value = TypeVar("Value")


def fit_gamma(manifest: Manifest) -> float:
    """The exponent that best turns the mean luminance of dark images into that of their clean ones.

    Least squares in the logarithm, over the training pairs, so that no scored image takes part.
    """
    table = manifest.pair_table(["split", "low_luminance", "high_luminance"])
    training = table.filter(pc.equal(table["split"], "train"))
    low, clean = (np.log(training[name].to_numpy().clip(1 / 255, 1)) for name in ("low_luminance", "high_luminance"))
    return float(low @ clean / max(low @ low, 1e-12))


def find_lpips(settings: EvaluationSettings) -> BackboneWeights | str:
    """The LPIPS backbone that the settings ask for, or why there is none.

    Raises:
        ValueError: weights are named that don't serve.
    """
    if settings.lpips == "none":
        return "turned off by evaluation.lpips"
    try:
        weights = find_backbone(settings.lpips, settings.lpips_weights)
        Lpips(weights)  # shows what is wrong with them before anything starts
    except LpipsUnavailable as reason:
        return str(reason)
    return weights


@dataclass(frozen=True)
class Shared:
    """What all images of one checkpoint have in common, as references that each scorer fetches once.

    Attributes:
        lpips: to what ``find_lpips`` gave.
        networks: to what ``checkpoint.load_candidates`` gave; none where pictures are scored.
    """

    lpips: ray.ObjectRef
    networks: ray.ObjectRef | None = None


class Scorer:
    """Holds a share of a split, decoded, and the LPIPS net; scores the images of one checkpoint after another.

    Any other image of the split is read when it is asked for, so that a scorer can stand in for another. Its arguments
    are small, since Ray starts it again with them where it died.

    Args:
        url: the data set.
        split: of which images are scored.
        share: which part of them is read at once: from this index on, in steps of ``shares``.
        shares: how many scorers share the split.
        settings: protocols and tiles.
        gamma: exponent of the gamma correction.
        device: where to run.
    """

    def __init__(
        self,
        url: str,
        split: Split,
        share: int,
        shares: int,
        settings: EvaluationSettings,
        gamma: float,
        device: str = "cpu",
    ) -> None:
        self._url = url
        self._records = {record.key: record for record in load_manifest(url).pairs(split)}
        self._settings = settings
        self._gamma = gamma
        self._device = device
        self._pairs: dict[str, PairPixels] = {}
        self._baselines: dict[str, list[Row]] = {}
        self._lpips: Lpips | str = "not fetched yet"
        self._networks: dict[str, AutoEncoder] = {}
        self._fetched: dict[str, ray.ObjectRef | None] = {}
        self._is_spent = False
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        name = "cpu" if device == "cpu" else torch.cuda.get_device_name(device)
        self._common = {"libraries": LIBRARIES, "device": name, "precision": PRECISION}
        for key in list(self._records)[share::shares]:
            with suppress(*FAILURES):  # said with the image's scores, after another try
                self._pair(key)

    def ready(self) -> None:
        """Answers once the scorer stands; a process that the machine failed ends, and the one in its place answers."""
        if self._is_spent:
            os._exit(1)

    def record_metrics(self, run: str, table: Table, seconds: float) -> None:
        """Record for Prometheus the scores of a run's newest checkpoint, and how long they took."""
        images, step = table["key"].nunique(), int(table["step"].max())
        Telemetry(run=run).record({"scored_step": step, "scored_images": images, "scoring_s": seconds})
        for (protocol, metric), column in means(table).items():
            for method, value in column.items():
                Telemetry(run=run, method=method, protocol=protocol).record({f"score_{metric}": value})

    def score(self, key: str, shared: Shared) -> list[Row]:
        """The rows of one image by ``input``, ``gamma``, ``student`` and ``averaged``."""
        self._fetch(shared)
        rows = list(self._baseline_rows(key))
        for name, network in self._networks.items():
            rows += self._rows(key, name, self._enhancer(network))
        return rows

    def score_picture(self, key: str, picture: Pixels, shared: Shared) -> list[Row]:
        """The rows of one image by ``input``, ``gamma``, and ``images``: uint8 [H, W, 3] made elsewhere."""
        self._fetch(shared)
        return self._baseline_rows(key) + self._rows(key, "images", lambda _: self._tensor(picture))

    def views(self, key: str, shared: Shared) -> dict[str, Pixels] | None:
        """Small pictures of one image by the checkpoint's student, by ``VIEWS``; none where it can't be enhanced."""
        self._fetch(shared)
        made, _ = self._attempt(lambda: self._views(key, self._enhancer(self._networks["student"])))
        return made

    def _views(self, key: str, run: Enhancer) -> dict[str, Pixels]:
        low, clean = self._images(key)
        enhanced = run(low)
        error = (enhanced - clean).abs().mean(dim=1).clamp(0, BRIGHTEST_ERROR)[0].cpu().numpy() / BRIGHTEST_ERROR
        coloured = (matplotlib.colormaps["inferno"](error)[..., :3] * 255).round().astype(np.uint8)
        pictures = [*(_pixels(image) for image in (low, low**self._gamma, enhanced, clean)), coloured]
        return {view: _small(picture) for view, picture in zip(VIEWS, pictures, strict=True)}

    def _baseline_rows(self, key: str) -> list[Row]:
        if key not in self._baselines:
            runs: dict[str, Enhancer] = {"input": lambda low: low, "gamma": lambda low: low**self._gamma}
            self._baselines[key] = [row for name, run in runs.items() for row in self._rows(key, name, run)]
        return self._baselines[key]

    def _rows(self, key: str, method: str, run: Enhancer) -> list[Row]:
        """A row for each number of one image by one method, or for the reason why there is none."""
        images, reason = self._attempt(lambda: self._enhanced_and_clean(key, run))
        rows: list[Row] = []
        for protocol, metrics, measure in self._measures():
            values = None
            if images is not None:
                values, reason = self._attempt(partial(measure, *images))
            common = {"key": key, "method": method, "protocol": protocol, "reason": reason, **self._common}
            rows += [common | {"metric": metric, "value": values and float(values[metric])} for metric in metrics]
            if metrics == ("lpips",) and not isinstance(self._lpips, str):
                rows[-1]["lpips_sha256"] = self._lpips.sha256
        return rows

    def _measures(self) -> Iterator[tuple[str, tuple[str, ...], Measure]]:
        for protocol in self._settings.protocols:
            yield protocol, ("psnr", "ssim"), partial(score, protocol=protocol)
        if self._settings.lpips != "none":
            yield self._settings.lpips, ("lpips",), self._distance

    def _distance(self, enhanced: Tensor, clean: Tensor) -> dict[str, Tensor]:
        if isinstance(self._lpips, str):
            raise ValueError(self._lpips)
        return {"lpips": self._lpips(enhanced, clean)}

    def _fetch(self, shared: Shared) -> None:
        _, reason = self._attempt(lambda: self._load(shared))
        if reason is not None:
            raise ValueError(reason)

    def _load(self, shared: Shared) -> None:
        if self._fetched.get("lpips") != shared.lpips:
            weights = ray.get(shared.lpips)
            self._lpips = weights if isinstance(weights, str) else Lpips(weights, self._device)
        if shared.networks and self._fetched.get("networks") != shared.networks:
            networks = ray.get(shared.networks)
            self._networks = {name: network.to(self._device) for name, network in networks.items()}
        self._fetched = vars(shared)

    def _attempt(self, compute: Callable[[], Value]) -> tuple[Value | None, str | None]:
        """What ``compute`` gives, or why the image fails; for lack of memory it is tried twice.

        Raises:
            MachineError: it fails for a reason of the machine, after which this process is not to be used again.
        """
        for is_last in (False, True):
            try:
                return compute(), None
            except FAILURES as error:
                cause = cause_of(error)
                if cause == "image":
                    return None, str(error)
                if cause == "machine" or is_last:
                    self._is_spent = True
                    raise MachineError(str(error)) from error
            torch.cuda.empty_cache()  # only here has the error let go of its tensors
        raise AssertionError

    def _enhancer(self, network: AutoEncoder) -> Enhancer:
        return partial(enhance, network, tile=self._settings.tile, overlap=OVERLAP, precision=PRECISION)

    def _enhanced_and_clean(self, key: str, run: Enhancer) -> tuple[Tensor, Tensor]:
        low, clean = self._images(key)
        return run(low), clean

    def _images(self, key: str) -> tuple[Tensor, Tensor]:
        low, clean = (self._tensor(image) for image in self._pair(key))
        return low, clean

    def _pair(self, key: str) -> PairPixels:
        if key not in self._pairs:
            self._pairs[key] = read_pair(self._url, self._records[key])
        return self._pairs[key]

    def _tensor(self, image: Pixels) -> Tensor:
        return torch.from_numpy(image.copy()).permute(2, 0, 1)[None].to(self._device) / 255


def _pixels(image: Tensor) -> Pixels:
    return eight_bit_levels(image[0]).permute(1, 2, 0).to(torch.uint8).cpu().numpy()


def _small(picture: Pixels) -> Pixels:
    image = Image.fromarray(picture)
    image.thumbnail((WIDEST_VIEW, WIDEST_VIEW), Image.Resampling.LANCZOS)
    return np.asarray(image)
