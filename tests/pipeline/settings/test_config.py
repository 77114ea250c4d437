"""Settings: composed, overridden, checked, and explained by --help."""

import pytest
from command_lines import URL, parsed

from pipeline.settings.command_line import user_errors
from pipeline.settings.config import differences


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config", "lol_v1"], "data.url: Field required"),
        (["--config", "nothing"], r"--config nothing: not a preset \(demo, lol_v1"),
        (["--config", "missing.yaml"], "missing.yaml: no such settings file"),
        (["--config", "lol_v1", *URL, "--run.seed", "-1"], r"run.seed: .* greater than or equal to 0 \(given: '-1'\)"),
        (["--config", "lol_v1", *URL, "--run.seed", "4294967296"], "run.seed: .* equal to 4294967295 .*'4294967296'"),
        (["--config", "lol_v1", *URL, "--run.root", "s3:/b/x"], "run.root: s3:/b/x: misspelt; write .*s3://buck"),
        (["--config", "lol_v1", "--data.url", ""], "data.url: '' is no place; give a local path or s3://"),
        (["--config", "lol_v1", *URL, "--train.steps", "0"], "train.steps: Input should be greater than or equal to 1"),
        (["--config", "lol_v1", *URL, "--optimizer.zero-stage", "3"], "zero_stage: must be 0, 1 or 2: stage 3 shards"),
        (["--config", "lol_v1", *URL, "--run.workers", "3"], r"train.global_batch \(8\) must be a multiple of"),
        (["--config", "lol_v1", *URL, "--data.crop", "100"], "data.crop: Input should be a multiple of 32"),
        (["--config", "lol_v1", *URL, "--objective.beta", "0", "--objective.gamma", "2"], "gamma has no effect"),
        (
            ["--config", "lol_v1", *URL, "--data.crop", "32", "--train.global-batch", "1"],
            r"more than one pair of 32-pixel crops .* raise data.crop \(32\), or train.global_batch \(1\) above",
        ),
        (
            ["--config", "lol_v1", *URL, "--data.crop", "32", "--train.global-batch", "8", "--train.accumulation", "8"],
            r"global_batch \(8\) above train.accumulation \(8\)",
        ),
        (
            ["--config", "lol_v1", *URL, "--train.batch-norm", "worker"],
            "train.batch_norm: worker has no effect with one worker",
        ),
        (
            ["--config", "lol_v1", *URL, "--data.crop", "32", "--run.workers", "8", "--train.batch-norm", "worker"],
            r"pass of a worker: .*global_batch \(8\) above run.workers x train.accumulation \(8 x 1\)",
        ),
        (
            ["--config", "lol_v1", *URL, "--data.extra-urls", "/b", "--data.weights", "1e308", "1e308"],
            "data: weights must be above 0 and their sum finite",
        ),
        (["--config", "lol_v1", *URL, "--optimizer.warmup-steps", "30313"], "warmup_steps"),
        (["--config", "lol_v1", *URL, "--optimizer.final-learning-rate", "1"], "must not exceed learning_rate"),
        (
            ["--config", "lol_v1", *URL, "--checkpoint.split", "test"],
            "checkpoint.split: checkpoints are not chosen by the test split: .* with pipeline/evaluate.py --split test",
        ),
        (
            ["--config", "lol_v1", *URL, "--evaluation.protocols", "rgb_u8", "cidnet", "rgb_u8"],
            "protocols: each may be named once: rgb_u8, cidnet, rgb_u8",
        ),
        (["--config", "lol_v1", *URL, "--evaluation.protocols", "[]"], "evaluation.protocols: .* at least 1 item"),
        (["--config", "lol_v1", *URL, "--evaluation.protocols", "rgb_u8", "mine"], "evaluation.protocols.1: .*rgb_u8"),
        (
            ["--config", "lol_v1", *URL, "--evaluation.lpips", "none", "--evaluation.lpips-weights", "/w.pth"],
            "lpips_weights have no effect because lpips is none",
        ),
        (
            ["--config", "lol_v1", *URL, "--checkpoint.metric", "lpips", "--evaluation.lpips", "none"],
            "checkpoint.metric is lpips, which evaluation.lpips: none turns off",
        ),
    ],
)
def test_mistakes_are_named_and_end_with_status_2(options, message, capsys):
    import re

    with pytest.raises(SystemExit) as exit, user_errors():
        parsed(*options)
    assert exit.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    "options",
    [
        ["--data.crop", "64", "--train.global-batch", "1"],
        ["--data.crop", "32", "--train.global-batch", "2", "--run.workers", "2"],  # statistics span all workers
        ["--data.crop", "32", "--train.global-batch", "8", "--train.accumulation", "4"],
    ],
)
def test_two_values_of_each_channel_are_enough_for_batch_normalisation(options):
    assert parsed("--config", "lol_v1", *URL, *options).data.url == "/data"


def test_identity_ignores_what_cannot_change_the_weights():
    config = parsed("--config", "demo")
    same = parsed(
        "--config", "demo", "--run.max-failures", "9", "--train.log-every", "1", "--data.url", "/moved",
        "--data.extra-urls", "[/more]", "--data.on-bad-data", "skip", "--data.cache", "/fast", "--data.cache-gib", "1",
        "--data.threads", "1", "--data.fetches", "1", "--data.ahead", "1", "--run.workers", "2",
        "--optimizer.zero-stage", "2", "--optimizer.channels-last", "true",
    )  # fmt: skip
    assert same.identity() == config.identity()


@pytest.mark.parametrize(
    "change",
    [
        ("--objective.beta", "0.3"),
        ("--run.seed", "1"),
        ("--data.crop", "32"),
        ("--data.flips", "false"),
        ("--data.shuffle-shards", "3"),
        ("--data.drop-last", "true"),
        ("--train.accumulation", "2"),  # batch normalisation spans a forward pass
        ("--optimizer.precision", "bf16"),
    ],
)
def test_identity_tells_apart_what_changes_the_weights(change):
    assert parsed("--config", "demo", *change).identity() != parsed("--config", "demo").identity()


def test_identity_has_the_workers_where_each_normalises_by_its_own_batch():
    own = ("--config", "demo", "--train.batch-norm", "worker", "--run.workers")
    found = differences(parsed(*own, "2").identity(), parsed(*own, "4").identity())
    assert found == [("run.workers", 2, 4)]


def test_identity_tells_mixtures_apart():
    mixed = ("--config", "demo", "--data.extra-urls", "[/more]")
    assert parsed(*mixed, "--data.weights", "[1, 2]").identity() != parsed(*mixed).identity()


def test_differences_of_two_identities_are_named_in_full():
    before = parsed("--config", "demo").identity()
    now = parsed("--config", "demo", "--run.seed", "7", "--teacher.norm", "separate", "--train.steps", "77").identity()
    found = {name: (old, new) for name, old, new in differences(before, now)}
    assert found == {
        "seed": (0, 7),
        "teacher.norm": (before["teacher"]["norm"], "separate"),
        "train.steps": (before["train"]["steps"], 77),
    }
    assert differences(before, before) == []


def test_what_one_identity_alone_has_differs_from_none():
    before, now = {"ranges": {"gamma": [1, 2], "beta": [3, 4]}}, {"ranges": {"gamma": [1, 2], "rate": [5, 6]}, "new": 7}
    assert differences(before, now) == [("ranges.beta", [3, 4], None), ("ranges.rate", None, [5, 6]), ("new", None, 7)]
    assert differences({"part": {"a": 1}}, {"part": None}) == [("part", {"a": 1}, None)]
