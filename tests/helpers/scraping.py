"""Reads what Ray exports of a node, as Prometheus does."""

import urllib.request
from typing import NamedTuple
from urllib.error import URLError

from commands import RayHead
from prometheus_client.parser import text_string_to_metric_families


class Series(NamedTuple):
    """The present value of a metric under its labels; ``kind`` is ``gauge``, ``counter`` and so on."""

    name: str
    kind: str
    labels: dict[str, str]
    value: float


def scrape(head: RayHead, **labels: str) -> list[Series]:
    """What the head's node exports under these labels; nothing before its metrics agent is up."""
    try:
        with urllib.request.urlopen(head.metrics, timeout=10) as reply:
            families = list(text_string_to_metric_families(reply.read().decode()))
    except URLError:
        return []
    return [
        Series(sample.name, family.type, sample.labels, sample.value)
        for family in families
        for sample in family.samples
        if labels.items() <= sample.labels.items()
    ]
