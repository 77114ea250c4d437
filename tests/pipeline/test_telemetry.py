"""What Prometheus is told, as it finds it on a real Ray cluster."""

import sys
import time

import pytest
import ray
from ray import cloudpickle
from scraping import scrape

from iaml.objective import TERMS, Objective, ObjectiveSettings
from pipeline import telemetry
from pipeline.data.loader import LoaderState
from pipeline.run.record import read_metrics
from pipeline.telemetry import METRICS, Metric, Telemetry
from pipeline.training.monitor import Monitor

cloudpickle.register_pickle_by_value(sys.modules[__name__])
TAGS = {"run": "probe", "rank": "3", "method": "student", "protocol": "rgb_u8"}


@pytest.fixture
def told(monkeypatch):
    """What is told from now on, by the name that Prometheus knows, instead of being passed on to Ray."""
    values = {}

    class Instrument:
        def __init__(self, metric):
            self.name, self.tags = metric.name, metric.tags

        def set(self, value, tags):
            assert tags.keys() == set(self.tags), "which Ray refuses"
            values[self.name] = (value, tags)

        def inc(self, value, tags):
            assert value > 0, "which Ray refuses"
            values[self.name] = (values.get(self.name, (0,))[0] + value, tags)

    monkeypatch.setattr(telemetry, "_shown", {})
    monkeypatch.setattr(telemetry, "_instrument", Instrument)
    return values


class Probe:
    """Tells all numbers, and one that nobody has heard of; gauges last as long as it does."""

    def record_metrics(self):
        new = Metric("gauge", "iaml_colour_shift_2", ("run",), "")
        expected = {}
        for value, (name, metric) in enumerate([*METRICS.items(), ("colour shift/2", new)], start=1):
            tags = {tag: TAGS[tag] for tag in metric.tags}
            teller = Telemetry(**tags)
            for present in (value, value, 2.5 * value):
                teller.record({name: present})
            kind = "counter" if metric.name.endswith("_total") else "gauge"
            expected[f"ray_{metric.name}"] = (kind, tags, 2.5 * value)
        return expected


def test_all_numbers_reach_prometheus_under_their_names_kinds_and_tags(ray_head, driver):
    # a process of its own, since one that was a driver several times has Ray count its numbers as often
    probe = ray.remote(num_cpus=0)(Probe).remote()
    expected, found = ray.get(probe.record_metrics.remote()), {}
    deadline = time.monotonic() + 60
    while found != expected and time.monotonic() < deadline:
        time.sleep(0.2)
        for name, kind, labels, value in scrape(ray_head, run="probe"):
            found[name] = (kind, {tag: labels[tag] for tag in TAGS if tag in labels}, value)
    assert found == expected
    time.sleep(4)  # here Ray forgets a gauge that has not been set for 2 seconds
    assert {name for name, *_ in scrape(ray_head, run="probe")} == expected.keys()


def test_a_run_tells_what_its_workers_read_and_how_many_images_were_scored(ray_head, trained):
    found = {(name, labels.get("rank")): value for name, _, labels, value in scrape(ray_head, run="small")}
    for rank in ("0", "1"):
        assert found["ray_iaml_pairs_total", rank] == 48 * 8 / 2
        assert found["ray_iaml_data_wait_seconds_total", rank] > 0
    assert found["ray_iaml_scored_images_total", None] == 4 * 3


def test_the_monitor_tells_what_it_records(told, tmp_path):
    terms = dict.fromkeys(Objective(ObjectiveSettings()).weights, 0.25)
    metrics = {**terms, "loss": 0.5, "learning_rate": 1e-3, "grad_norm": 2.0, "ema_rate": 0.9, "skipped_pairs": 0}
    seen = Monitor(str(tmp_path / "night"), steps=10, start=0, global_batch=4)
    seen.record(2, metrics)
    assert "iaml_skipped_pairs_total" not in told, "a counter that has nothing to count"
    seen.record(4, metrics | {"loss": 0.375, "skipped_pairs": 3})
    seen.note_checkpoint(4)
    images_per_s = told.pop("iaml_images_per_second")[0]
    assert images_per_s > 0
    expected = metrics | {"step": 4, "loss": 0.375, "skipped_pairs": 3, "checkpoint_step": 4}
    assert told == {METRICS[name].name: (value, {"run": "night"}) for name, value in expected.items()}
    assert {"iaml_reconstruction_loss", "iaml_ssim_loss", "iaml_mirror_loss"} < told.keys()


def test_a_term_that_nobody_has_heard_of_is_recorded_and_told(told, tmp_path):
    seen = Monitor(str(tmp_path / "night"), steps=10, start=0, global_batch=4)
    seen.record(2, {"loss": 0.5, "colour": 0.125})
    seen.close()
    assert told["iaml_colour"] == (0.125, {"run": "night"})
    assert read_metrics(str(tmp_path / "night"))[0]["colour"] == 0.125


def test_each_term_of_the_objective_has_words_for_prometheus():
    assert TERMS.keys() == Objective(ObjectiveSettings()).weights.keys()
    assert [METRICS[name].description for name in TERMS] == [
        "Reconstruction loss, unweighted", "1 - SSIM, unweighted", "Mirror loss, unweighted"
    ]  # fmt: skip


def test_all_that_a_loader_states_can_be_told(told):
    state = LoaderState(*range(1, 1 + len(LoaderState._fields)))
    teller = Telemetry(run="night", rank="1")
    teller.record(state._asdict())
    teller.record(state._asdict())
    expected = state._asdict().items()
    assert told == {METRICS[name].name: (value, {"run": "night", "rank": "1"}) for name, value in expected}
