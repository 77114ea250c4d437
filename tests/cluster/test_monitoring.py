"""The Grafana dashboard asks for what is really exported."""

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from commands import ROOT
from ray.dashboard.modules.reporter.reporter_agent import GPU_TAG_KEYS, METRICS_GAUGES
from scraping import scrape

from pipeline.telemetry import METRICS

FOLDER = ROOT / "cluster/monitoring"


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return json.loads((FOLDER / "grafana-dashboard.json").read_text())


@pytest.fixture(scope="module")
def exported(ray_head) -> dict[str, set[str]]:
    """The labels of every metric: ours as defined, Ray's as its head exports them, or defines them for GPUs."""
    found = {f"ray_{metric.name}": {*metric.tags, "SessionName", "NodeAddress"} for metric in METRICS.values()}
    gpus = [name for name in METRICS_GAUGES if name.startswith(("node_gpu", "node_gram"))]
    found |= {f"ray_{name}": {*GPU_TAG_KEYS, "SessionName"} for name in gpus}
    deadline = time.monotonic() + 60
    while not {"ray_node_cpu_count", "ray_resources"} <= found.keys():  # of the node's agent, and of Ray's other parts
        assert time.monotonic() < deadline, f"Ray's own metrics are not there: {sorted(found)}"
        time.sleep(0.2)
        for name, _, labels, _ in scrape(ray_head):
            found.setdefault(name, set()).update(labels)
    return found


def questions(dashboard: dict[str, Any]) -> Iterator[str]:
    """All that the dashboard asks Prometheus for."""
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel.get("targets", []))
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]["query"]


def unknown(dashboard: dict[str, Any], exported: dict[str, set[str]]) -> set[str]:
    """Names of metrics, or ``name.label``, that the dashboard asks for and nobody exports."""
    found = set()
    for question in questions(dashboard):
        names = re.findall(r"[A-Za-z_:][\w:]*(?=\{)|(?<=label_values\()\w+", question)
        assert names, question
        labels = re.findall(r"(\w+)=~?\"|by \(([\w, ]+)\)", question.replace("!=", "="))
        asked = {label for plain, several in labels for label in (plain or several).split(", ")} - {"instance"}
        found |= {name for name in names if name not in exported}
        found |= {f"{name}.{label}" for name in names for label in asked - exported.get(name, asked)}
    return found


def test_the_dashboard_asks_for_nothing_that_is_not_exported(dashboard, exported):
    assert unknown(dashboard, exported) == set()


@pytest.mark.parametrize(
    ("right", "wrong", "found"),
    [
        ("ray_iaml_loss{", "ray_iaml_losses{", "ray_iaml_losses"),
        ("ray_iaml_loss{", "iaml_loss{", "iaml_loss"),
        ("ray_resources{", "ray_resource{", "ray_resource"),
        ("ray_iaml_step{", "ray_iaml_steps{", "ray_iaml_steps"),
        ("(run, rank) (rate(ray_iaml_fe", "(run, worker) (rate(ray_iaml_fe", "ray_iaml_fetched_bytes_total.worker"),
    ],
)
def test_a_wrong_name_would_be_found(dashboard, exported, right, wrong, found):
    text = json.dumps(dashboard)
    assert right in text
    assert unknown(json.loads(text.replace(right, wrong)), exported) == {found}


def test_every_metric_of_ours_is_shown(dashboard):
    asked = " ".join(questions(dashboard))
    assert [metric.name for metric in METRICS.values() if f"ray_{metric.name}{{" not in asked] == []


def test_panels_have_numbers_of_their_own_and_do_not_overlap(dashboard):
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [
        (panel["gridPos"]["x"] + column, panel["gridPos"]["y"] + row)
        for panel in panels
        for column in range(panel["gridPos"]["w"])
        for row in range(panel["gridPos"]["h"])
    ]
    assert len(places) == len(set(places)) and max(column for column, _ in places) < 24
