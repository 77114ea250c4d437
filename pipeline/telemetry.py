"""The metrics of a run for Prometheus: how it comes along, how each worker's data flow, what its checkpoints score.

Each process hands them to the metrics agent that Ray runs on its node, which Prometheus asks; Ray puts ``ray_`` before
the names. A gauge shows its last value for as long as its process lives, a counter stays. Without Ray, nothing happens.
"""

import re
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, NamedTuple

from iaml.objective import TERMS

REPEAT_S = 1.0  # between two settings of a gauge, which Ray forgets after 20 seconds without one
RUN, WORKER, SCORE = ("run",), ("run", "rank"), ("run", "method", "protocol")


class Metric(NamedTuple):
    """A number as Prometheus knows it; ``tags`` are the labels that tell its series apart."""

    kind: Literal["gauge", "counter"]
    name: str
    tags: tuple[str, ...]
    description: str


METRICS = {
    # as the monitor records them
    "step": Metric("gauge", "iaml_step", RUN, "Optimizer steps done"),
    "loss": Metric("gauge", "iaml_loss", RUN, "Weighted sum of the loss terms, mean over the logged steps"),
    **{name: Metric("gauge", f"iaml_{name}_loss", RUN, f"{words}, unweighted") for name, words in TERMS.items()},
    "learning_rate": Metric("gauge", "iaml_learning_rate", RUN, "Learning rate"),
    "grad_norm": Metric("gauge", "iaml_gradient_norm", RUN, "Norm of the gradient, mean over the logged steps"),
    "ema_rate": Metric("gauge", "iaml_ema_rate", RUN, "Rate of the teacher's moving average"),
    "images_per_s": Metric("gauge", "iaml_images_per_second", RUN, "Training speed over all workers"),
    "skipped_pairs": Metric("counter", "iaml_skipped_pairs_total", RUN, "Visits of bad pairs that got another pair"),
    "checkpoint_step": Metric("gauge", "iaml_checkpoint_step", RUN, "Step of the newest checkpoint to be scored"),
    # as Loader.state has them
    "planned_steps": Metric("gauge", "iaml_planned_steps", WORKER, "Steps ahead whose shards are being fetched"),
    "ready_steps": Metric("gauge", "iaml_ready_steps", WORKER, "Steps ahead whose crops are ready"),
    "wait_s": Metric("counter", "iaml_data_wait_seconds_total", WORKER, "Time that steps waited for their crops"),
    "pairs": Metric("counter", "iaml_pairs_total", WORKER, "Pairs handed to training"),
    "decoded_pairs": Metric("counter", "iaml_decoded_pairs_total", WORKER, "Pairs decoded, not found in the cache"),
    "fetched_bytes": Metric("counter", "iaml_fetched_bytes_total", WORKER, "Bytes of shards fetched from S3"),
    "retries": Metric("counter", "iaml_fetch_retries_total", WORKER, "Requests for shards that were made again"),
    "cache_bytes": Metric("gauge", "iaml_cache_bytes", WORKER, "Room for the data sets in the node's cache"),
    "cached_bytes": Metric("counter", "iaml_cached_bytes_total", WORKER, "Bytes written to the node's cache"),
    # as the evaluation finds them
    "scored_step": Metric("gauge", "iaml_scored_step", RUN, "Step of the newest scored checkpoint"),
    "scored_images": Metric("counter", "iaml_scored_images_total", RUN, "Images scored"),
    "scoring_s": Metric("gauge", "iaml_scoring_seconds", RUN, "Time that the newest scores took"),
    "score_psnr": Metric("gauge", "iaml_score_psnr_decibels", SCORE, "PSNR of the newest scored checkpoint"),
    "score_ssim": Metric("gauge", "iaml_score_ssim", SCORE, "SSIM of the newest scored checkpoint"),
    "score_lpips": Metric("gauge", "iaml_score_lpips", SCORE, "LPIPS of the newest scored checkpoint"),
}


class Telemetry:
    """Records the numbers of ``METRICS``, all under the same ``tags``.

    A number that is not among them, such as a new term of the loss, is a gauge of its own name.
    """

    def __init__(self, **tags: str) -> None:
        self._tags = tags
        self._counted: dict[str, float] = defaultdict(float)

    def record(self, values: Mapping[str, float]) -> None:
        """Record the present values; of a counter its total so far, from 0 on."""
        for name, value in values.items():
            metric = METRICS.get(name) or self._unknown(name)
            if metric.kind == "gauge":
                _show(metric, self._tags, value)
            elif value > self._counted[name]:  # Ray refuses to add nothing
                _instrument(metric).inc(value - self._counted[name], self._tags)
                self._counted[name] = value

    def _unknown(self, name: str) -> Metric:
        allowed = re.sub(r"[^a-zA-Z0-9_]", "_", name)
        return Metric("gauge", f"iaml_{allowed}", tuple(self._tags), f"{name}, as it is recorded")


_shown: dict[tuple[Metric, frozenset[tuple[str, str]]], float] = {}
_lock = threading.Lock()


def _show(metric: Metric, tags: Mapping[str, str], value: float) -> None:
    _start_repeating()
    with _lock:
        _shown[metric, frozenset(tags.items())] = value
        _instrument(metric).set(value, dict(tags))


@cache
def _start_repeating() -> None:
    threading.Thread(target=_repeat, name="telemetry", daemon=True).start()


def _repeat() -> None:
    """Set all gauges again and again."""
    while True:
        time.sleep(REPEAT_S)
        with _lock:
            for (metric, tags), value in _shown.items():
                _instrument(metric).set(value, dict(tags))


@cache
def _instrument(metric: Metric) -> Any:
    from ray.util.metrics import Counter, Gauge  # takes a while, and commands without metrics do without

    kind = Gauge if metric.kind == "gauge" else Counter
    return kind(metric.name, metric.description, metric.tags)
