"""Every option of every command has a case here: another value than the default, and what that must change.

An option of training is given to a run of seconds, which is compared with one that differs in nothing else. Packing,
darkening and scoring run as they are. What needs a cluster, GPUs or a search names the test that does it.
"""

import argparse
import ast
import importlib
import math
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import ray
import torch
from commands import ROOT, options
from datasets import packed, write_pairs
from local_training import Training, same, train
from numpy.typing import NDArray
from PIL import Image
from ray import cloudpickle
from ray.train import TrainingFailedError
from score_tables import make_run

from pipeline import ablate, darken, demo_photographs, evaluate, interruption, pack
from pipeline.data.manifest import load_manifest
from pipeline.evaluation import pool as pools
from pipeline.launch import ablation, cluster, preflight, scoring, trainer
from pipeline.packing import photographs as photographs_module
from pipeline.packing import shard_writer
from pipeline.run import checkpoint
from pipeline.settings.command_line import argument_parser
from pipeline.settings.config import Config, differences
from pipeline.settings.files import parse_config
from pipeline.settings.packing import PackSettings
from tune import space
from tune.settings import SearchConfig

STEPS = 4
MOMENTS = ("exp_avg", "exp_avg_sq")
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Case:
    """Another value of an option, and what it does.

    Attributes:
        value: words of the command line; ``{name}`` is a folder of the fixture ``folders``.
        effect: whether the command without it and with it did what they should.
        beside: options without which it has no effect.
        moves: whether the weights become others, bit for bit; none where it may be either.
    """

    value: str
    effect: Callable[..., bool]
    beside: dict[str, str] = field(default_factory=dict)
    moves: bool | None = True


# --- training


def rates(peak: float = 1e-3, final: float = 1e-5, warmup: int = 0) -> list[float]:
    """The learning rates of the steps."""
    cosine = [(1 + math.cos(math.pi * step / (STEPS - warmup))) / 2 for step in range(STEPS - warmup)]
    return [peak * (step + 1) / warmup for step in range(warmup)] + [final + (peak - final) * part for part in cosine]


def recorded(run: Training, name: str) -> list[float]:
    return [record[name] for record in run.records]


def near(found: list[float], expected: list[float]) -> bool:
    return found == pytest.approx(expected, rel=1e-5)


def is_weighted_sum(run: Training, ssim: float, mirror: float) -> bool:
    terms = zip(*(recorded(run, name) for name in ("reconstruction", "ssim", "mirror")), strict=True)
    return near(recorded(run, "loss"), [one + ssim * two + mirror * three for one, two, three in terms])


def moments(run: Training, kind: str) -> torch.Tensor:
    """Adam's, after the first step."""
    found = run.tensors("optimizer", step=1)
    return torch.cat([found[name].flatten() for name in sorted(found) if name.endswith(f".{kind}")])


def ratio(run: Training, base: Training, kind: str) -> float:
    """By how much moments are longer than those of another run, to which they must be parallel."""
    ours, theirs = moments(run, kind), moments(base, kind)
    longer = float(ours.norm() / theirs.norm())
    torch.testing.assert_close(ours, theirs * longer)
    return longer


def trained_projections(run: Training) -> list[int]:
    names = [f"decoder.projections.{scale}.weight" for scale in range(4)]
    first, last = run.tensors(step=1), run.tensors()
    return [scale for scale, name in enumerate(names) if not torch.equal(first[name], last[name])]


def begins_where_it_ended(run: Training, other: Training) -> bool:
    name = "decoder.head.refine.2.weight"
    return torch.allclose(run.tensors(step=1)[name], other.tensors()[name], atol=1e-7)


def brightness_of_black(run: Training) -> float:
    student = checkpoint.load_candidates(str(run.folder / f"checkpoint-{STEPS:08d}"), run.config.network)["student"]
    with torch.no_grad():
        return float(student(torch.zeros(1, 3, 32, 32)).mean())


def first(run: Training, name: str) -> float:
    return recorded(run, name)[0]


def black_share(run: Training) -> float:
    """Of the crops, how many are wholly black."""
    crops = np.concatenate([clean for step in run.batches for _, clean in step])
    return float((crops.reshape(len(crops), -1).max(axis=1) == 0).mean())


def images_cut(run: Training, step: int) -> list[str | None]:
    """The images that a step's crops are parts of, by file name; none for a crop that is turned or mirrored."""
    places: dict[bytes, str] = {}
    for path in Path(run.config.data.url).parent.glob("source/train/high/*.png"):
        rows = np.lib.stride_tricks.sliding_window_view(np.asarray(Image.open(path)), 8, axis=1)  # [y, x, colour, 8]
        places |= dict.fromkeys((row.tobytes() for row in rows.reshape(-1, 24)), path.name)
    crops = np.concatenate([clean for _, clean in run.batches[step]])
    return [places.get(crop[:, 0, :8].tobytes()) for crop in crops]


def shards_cut(run: Training, step: int) -> set[str]:
    """The shards that hold those images."""
    shards = {f"{pair.key.split('-')[1]}.png": pair.shard for pair in load_manifest(run.config.data.url).pairs("train")}
    return {shards[str(name)] for name in images_cut(run, step)}


def shapes(run: Training) -> set[tuple[int, ...]]:
    return {(len(step), *low.shape) for step in run.batches for low, _ in step}


TRAINING = {
    "run.name": Case(
        "other", lambda base, run: run.folder.name == "other" and run.checkpoints == base.checkpoints, moves=False
    ),
    "run.root": Case(
        "{elsewhere}",
        lambda base, run: run.folder.parent.name == "elsewhere" and run.checkpoints == base.checkpoints,
        moves=False,
    ),
    "run.seed": Case("1", lambda base, run: first(run, "reconstruction") != first(base, "reconstruction")),
    "run.start_from": Case(
        "{runs}/base/checkpoint-00000004",
        lambda base, run: begins_where_it_ended(run, base),
        {"--optimizer.learning-rate": "1e-9", "--optimizer.final-learning-rate": "1e-9"},
    ),
    "data.url": Case(
        "{other}",
        lambda base, run: "other" in run.config.data.url and None not in images_cut(run, 0),
        {"--data.flips": "false"},
    ),
    "data.extra_urls": Case("{black}", lambda base, run: 0 < black_share(run) < 0.5),  # 3 of 12 pairs
    "data.weights": Case("1 3", lambda base, run: 0.5 < black_share(run) < 1, {"--data.extra-urls": "{black}"}),
    "data.crop": Case("64", lambda base, run: shapes(run) == {(1, 8, 3, 64, 64)}),
    "data.flips": Case("false", lambda base, run: None not in images_cut(run, 0) and None in images_cut(base, 0)),
    "data.shuffle_shards": Case(
        "1",
        lambda base, run: [len(shards_cut(run, step)) for step in range(3)] == [1, 1, 1],
        {"--train.global-batch": "3", "--data.flips": "false"},
    ),
    "data.on_bad_data": Case(
        "skip", lambda base, run: recorded(run, "skipped_pairs")[-1] > 0, {"--data.url": "{damaged}"}
    ),
    "data.cache": Case(
        "{cache}",
        lambda base, run: bool(list(run.config.data.cache.rglob("*.pixels"))),
        {"--data.cache-gib": "1"},
        moves=False,
    ),
    "data.cache_gib": Case(
        "0.00001",
        lambda base, run: "no room for this data set" in run.printed and "cache" not in base.printed,
        {"--data.cache": "{cache}"},
        moves=False,
    ),
    "data.threads": Case("1", lambda base, run: run.threads["cut"] == 1, moves=False),
    "data.fetches": Case("1", lambda base, run: run.threads["fetch"] == 1, moves=False),
    "run.cpus_per_worker": Case(
        "2", lambda base, run: (base.compute_threads, run.compute_threads) == (1, 2), moves=None
    ),
    "train.steps": Case("2", lambda base, run: recorded(run, "step") == run.checkpoints == [1, 2]),
    "train.global_batch": Case("4", lambda base, run: shapes(run) == {(1, 4, 3, 32, 32)}),
    "train.accumulation": Case("2", lambda base, run: shapes(run) == {(2, 4, 3, 32, 32)}),
    "train.log_every": Case(
        "3", lambda base, run: recorded(run, "step") == [3, 4] and recorded(base, "step") == [1, 2, 3, 4], moves=False
    ),
    "optimizer.learning_rate": Case(
        "0.01",
        lambda base, run: (
            near(recorded(run, "learning_rate"), rates(peak=0.01)) and near(recorded(base, "learning_rate"), rates())
        ),
    ),
    "optimizer.final_learning_rate": Case(
        "1e-4", lambda base, run: near(recorded(run, "learning_rate"), rates(final=1e-4))
    ),
    "optimizer.warmup_steps": Case("2", lambda base, run: near(recorded(run, "learning_rate"), rates(warmup=2))),
    "optimizer.betas": Case(
        "0.5 0.9", lambda base, run: near([ratio(run, base, kind) for kind in MOMENTS], [0.5 / 0.1, 0.1 / 0.001])
    ),
    "optimizer.clip": Case(
        "0.01",
        lambda base, run: near([10 * float(moments(run, "exp_avg").norm())], [0.01]) and first(run, "grad_norm") > 0.01,
    ),
    "optimizer.precision": Case(
        "float32",
        lambda base, run: (
            first(run, "loss") == pytest.approx(first(base, "loss"), rel=0.05)
            and {value.dtype for value in run.tensors().values()} == {torch.float32, torch.int64}
        ),
        moves=None,  # a processor without bfloat16 takes float32 by itself
    ),
    "optimizer.zero_stage": Case("2", lambda base, run: (base.zero_stage, run.zero_stage) == (0, 2), moves=None),
    "optimizer.channels_last": Case(
        "false",
        lambda base, run: (base.layouts, run.layouts) == ({torch.channels_last}, {torch.contiguous_format}),
        moves=None,
    ),
    "network.width": Case(
        "0.125", lambda base, run: [len(one.tensors()["encoder.levels.0.0.weight"]) for one in (base, run)] == [4, 8]
    ),
    "network.head": Case("sigmoid", lambda base, run: brightness_of_black(base) < 0.3 < 0.4 < brightness_of_black(run)),
    "objective.mirror_weight": Case(
        "0.5", lambda base, run: is_weighted_sum(run, 1, 0.5) and is_weighted_sum(base, 1, 0.8)
    ),
    "objective.scale_weights": Case(
        "0 1 0 0", lambda base, run: trained_projections(run) == [1] and trained_projections(base) == [0, 1, 2, 3]
    ),
    "objective.beta": Case(
        "1.2", lambda base, run: first(base, "mirror") < first(run, "mirror") < 2.2 / 1.6 * first(base, "mirror")
    ),
    "objective.gamma": Case(
        "2", lambda base, run: first(base, "mirror") / 1.6 < first(run, "mirror") < first(base, "mirror")
    ),
    "objective.reconstruction": Case(
        "mse",
        lambda base, run: (
            first(base, "reconstruction") ** 2 - 1e-6 <= first(run, "reconstruction") < first(base, "reconstruction")
        ),
    ),
    "objective.ssim_weight": Case("0.5", lambda base, run: is_weighted_sum(run, 0.5, 0.8)),
    "teacher.ema_rate": Case(
        "0.3",
        lambda base, run: (
            near(recorded(run, "ema_rate"), [0, 0.3, 0.3, 0.3])
            and near(recorded(base, "ema_rate"), [1 - n**-0.75 for n in range(1, 5)])
        ),
    ),
    "teacher.ema_warmup": Case("0", lambda base, run: near(recorded(run, "ema_rate"), [0.999] * STEPS)),
    "teacher.norm": Case(
        "separate",
        lambda base, run: {name.split(".")[0] for name in run.tensors("teacher")} == {"decoder", "clean_statistics"},
    ),
    "checkpoint.every": Case(
        "3", lambda base, run: run.checkpoints == [3, 4] and base.checkpoints == [1, 2, 3, 4], moves=False
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders that the cases name: data sets and empty ones."""
    root = tmp_path_factory.mktemp("options")
    urls = {name: packed(root / name) for name in ("usual", "damaged")}
    urls["other"] = packed(root / "other", size=(80, 60))
    record = load_manifest(urls["damaged"]).pairs("train")[4]
    with Path(urls["damaged"], record.shard).open("r+b") as file:
        file.seek(record.high_offset + 60)
        file.write(b"\0\0\0\0")
    write_pairs(root / "black/train", 3)
    for path in (root / "black/train").glob("*/*.png"):
        Image.new("RGB", (72, 48)).save(path)
    urls["black"] = str(root / "shards")
    shard_writer.pack(PackSettings(source=root / "black", out=urls["black"]))
    return urls | {name: str(root / name) for name in ("runs", "elsewhere", "cache")}


@pytest.fixture(scope="module")
def base(folders: dict[str, str]) -> Training:
    """The run that all others are compared with."""
    return train(settings_of({"--run.name": "base"}, folders))


def settings_of(changes: dict[str, str], folders: dict[str, str]) -> Config:
    """Those of a run of seconds, as the command reads them."""
    usual = {"--data.url": "{usual}", "--run.root": "{runs}", "--checkpoint.every": "1"}
    words = [word.format(**folders) for name, value in (usual | changes).items() for word in (name, *value.split(" "))]
    argv = [*options(), *words]
    config, _ = parse_config(argument_parser(""), Config, argv)
    preflight.check_data(config)
    return config


def test_the_same_options_give_the_same_bits(base: Training, folders: dict[str, str]) -> None:
    again = train(settings_of({"--run.name": "again"}, folders))
    assert same(base.tensors(), again.tensors()) and same(base.tensors("teacher"), again.tensors("teacher"))


@pytest.mark.parametrize("name", TRAINING)
def test_options_of_training(name: str, base: Training, folders: dict[str, str]) -> None:
    case, option = TRAINING[name], f"--{name.replace('_', '-')}"
    run = train(settings_of({"--run.name": name} | case.beside | {option: case.value}, folders))
    assert case.effect(base, run), (base.printed, run.printed)
    assert case.moves is None or same(base.tensors(), run.tensors()) != case.moves


def test_workers_share_a_run(trained: tuple[Path, list[str], str]) -> None:
    _, arguments, printed = trained
    assert arguments[arguments.index("--run.workers") + 1] == "2"
    assert re.search(r"node \S+: ranks 0-1 on CPU", printed)


def test_a_seed_of_the_base_has_no_effect_on_ablations_and_is_refused(refusal: Callable[..., str]) -> None:
    message = refusal(ablate, *options(**{"--run.seed": "3", "--arms": "no-mirror"}))
    assert "run.seed (3) has no effect on ablations: give --seeds, and leave it at 0" in message


@pytest.mark.slow
def test_a_run_gives_up_after_as_many_failures_as_are_allowed(
    driver: None, folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process more, which takes seconds to start

    def fail(settings: dict[str, object]) -> None:
        with (tmp_path / "starts").open("a") as file:
            file.write("started\n")
        raise ConnectionError("the worker's node is gone")

    monkeypatch.setattr("pipeline.training.worker.train", fail)
    changes = {"--run.max-failures": "1", "--run.use-gpu": "false", "--run.name": "failing"}
    with pytest.raises(TrainingFailedError, match="the worker's node is gone"), interruption.graceful_shutdown():
        interruption.run_shielded(trainer.make_trainer(settings_of(changes, folders), {}, None, "none").fit)
    assert (tmp_path / "starts").read_text().count("started") == 2


# --- commands that need no cluster


def call(module: ModuleType, *arguments: str) -> None:
    """Run a command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__, *arguments])
        module.main()


def result_of(module: ModuleType, name: str, case: Case | None, usual: dict[str, str], folder: Path) -> Path:
    """Where a command that reads ``--source`` and writes ``--out`` left what it made, with an option or without."""
    changes = {"--out": str(folder / "out")} | (case.beside if case else {})
    if case:
        changes[f"--{name.replace('_', '-')}"] = case.value.format(folder=folder)
    call(module, *(f"{option}={value}" for option, value in (usual | changes).items()))
    return Path(changes["--out"])


def splits(url: Path) -> dict[str, set[str]]:
    """The keys of each split."""
    rows = load_manifest(str(url)).pair_table(["key", "split"]).to_pylist()
    return {name: {row["key"] for row in rows if row["split"] == name} for name in ("train", "dev")}


def largest_shard(url: Path) -> int:
    return int(load_manifest(str(url)).split("train").pairs.max())


def scenes(url: Path) -> int:
    return len(set(load_manifest(str(url)).pair_table(["scene"])["scene"].to_pylist()))


PACKING = {
    "source": Case(
        "{folder}/one", lambda base, out: sum(map(len, splits(out).values())) == 1 < len(splits(base)["train"])
    ),
    "out": Case("{folder}/there", lambda base, out: out.name == "there" and out.joinpath("manifest.parquet").exists()),
    "shard_pairs": Case("2", lambda base, out: (largest_shard(base), largest_shard(out)) == (12, 2)),
    "dev_fraction": Case("0.5", lambda base, out: [len(splits(one)["dev"]) for one in (base, out)] == [1, 6]),
    "scene_pattern": Case("-([0-9])", lambda base, out: (scenes(base), scenes(out)) == (12, 10)),  # 1, 10 and 11
    "near_duplicate_bits": Case("0", lambda base, out: (scenes(base), scenes(out)) == (12, 13)),
    "seed": Case("4", lambda base, out: splits(out)["dev"] != splits(base)["dev"]),
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The usual options of packing; the last pair is nearly the one before it."""
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder, 12)
    for side in ("low", "high"):
        image = Image.open(folder / side / "11.png")
        image.paste((255, 255, 255), (30, 20, 36, 26))
        image.save(folder / side / "12.png")
    return {"--source": str(folder)}


@pytest.fixture(scope="module")
def usually_packed(pairs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return result_of(pack, "", None, pairs, tmp_path_factory.mktemp("packed"))


@pytest.mark.parametrize("name", PACKING)
def test_options_of_packing(name: str, pairs: dict[str, str], usually_packed: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "one", 1)
    assert PACKING[name].effect(usually_packed, result_of(pack, name, PACKING[name], pairs, tmp_path))


def dark(folder: Path) -> Pixels:
    """The first dark image."""
    return np.asarray(Image.open(sorted(folder.glob("low/*.png"))[0]))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("low/*.png"))


def spread(folder: Path) -> float:
    """How much the pixels of the photograph's even left half differ: its noise."""
    return float(dark(folder)[:, :32].std(axis=(0, 1)).mean())


def tint(folder: Path) -> float:
    """How far red and blue lie from green on the even grey."""
    red, green, blue = dark(folder)[:, :32].mean(axis=(0, 1))
    return max(abs(red - green), abs(blue - green)) / green


DARKENING = {
    "source": Case("{folder}/one", lambda base, out: names(base) == ["grey-v0.png"] and names(out) == ["other-v0.png"]),
    "out": Case("{folder}/there", lambda base, out: out.name == "there" and names(out) == names(base)),
    "variants": Case("2", lambda base, out: names(out) == ["grey-v0.png", "grey-v1.png"]),
    "max_side": Case("32", lambda base, out: (dark(base).shape, dark(out).shape) == ((64, 64, 3), (32, 32, 3))),
    "seed": Case("1", lambda base, out: not np.array_equal(dark(base), dark(out))),
    "camera.least_stops": Case("5", lambda base, out: dark(out).mean() < dark(base).mean()),
    "camera.most_stops": Case("3", lambda base, out: dark(out).mean() > dark(base).mean()),
    "camera.least_full_well": Case("12000", lambda base, out: spread(out) < spread(base)),
    "camera.most_full_well": Case("2000", lambda base, out: spread(out) > spread(base)),
    "camera.read_noise": Case("60", lambda base, out: spread(out) > 2 * spread(base)),
    "camera.colour_cast": Case("0", lambda base, out: tint(out) < 0.02 < tint(base)),
    "camera.bits": Case("6", lambda base, out: len(np.unique(dark(out))) < 12 < len(np.unique(dark(base)))),
}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The usual options of darkening."""
    folder = tmp_path_factory.mktemp("photographs")
    write_photograph(folder / "grey.png")
    return {"--source": str(folder)}


def write_photograph(path: Path) -> None:
    """Even grey on the left, rising to white on the right."""
    path.parent.mkdir(exist_ok=True)
    row = np.concatenate([np.full(32, 200), np.linspace(0, 255, 32)]).astype(np.uint8)
    Image.fromarray(np.tile(row[None, :, None], (64, 1, 3))).save(path)


@pytest.fixture(scope="module")
def usually_dark(photographs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return result_of(darken, "", None, photographs, tmp_path_factory.mktemp("dark"))


@pytest.mark.parametrize("name", DARKENING)
def test_options_of_darkening(name: str, photographs: dict[str, str], usually_dark: Path, tmp_path: Path) -> None:
    write_photograph(tmp_path / "one/other.png")
    assert DARKENING[name].effect(usually_dark, result_of(darken, name, DARKENING[name], photographs, tmp_path))


def test_photographs_go_where_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(photographs_module, "PHOTOGRAPHS", {"train": ["coins.png"], "test": ["moon.png"]})
    call(demo_photographs, "--out", str(tmp_path / "there"))
    assert {path.name for path in (tmp_path / "there").glob("*/*.png")} == {"coins.png", "moon.png"}
    assert capsys.readouterr().out == f"2 photographs in {tmp_path}/there\n"


# --- scoring


def test_options_of_scoring_pictures(
    driver: None, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All at once: a pool takes seconds to start."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for path in (Path(shards).parent / "source/test/high").glob("*.png"):
        (pictures / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(cluster, "session", lambda cpus, log: nullcontext())
    asked: list[dict[str, float]] = []
    remote = ray.remote
    monkeypatch.setattr(pools.ray, "remote", lambda **asking: asked.append(asking) or remote(**asking))
    started = []
    start = pools.Pool.start
    monkeypatch.setattr(pools.Pool, "start", lambda *given: started.append(start(*given)) or started[-1])
    call(
        evaluate, "--images", str(pictures), "--data.url", shards, "--split", "test",
        "--out", str(tmp_path / "s.parquet"), "--evaluation.protocols", "cidnet", "basicsr_y",
        "--evaluation.lpips", "none", "--evaluation.actors", "2", "--evaluation.cpus-per-actor", "2",
    )  # fmt: skip
    (pool,) = started
    assert len(pool.actors) == 2 and asked[0]["num_cpus"] == 2
    pool.stop()
    table = pd.read_parquet(tmp_path / "s.parquet")
    assert set(table["protocol"]) == {"cidnet", "basicsr_y"} and set(table["metric"]) == {"psnr", "ssim"}
    assert set(table["key"]) == {"test-0", "test-1"} and set(table["method"]) == {"input", "gamma", "images"}
    assert (
        table.query("method == 'images' and protocol == 'basicsr_y' and metric == 'psnr'")["value"].eq(math.inf).all()
    )
    assert re.search(r"^images +128\.13 .* inf ", capsys.readouterr().out, re.MULTILINE)


def test_the_mean_of_the_last_is_of_as_many_as_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, {1: 40.0, 2: 30.0, 3: 21.0})
    monkeypatch.setattr(scoring, "load_data", lambda settings, found: None)
    monkeypatch.setattr(
        scoring, "score_candidates", lambda settings, found, manifest: [each.table("dev") for each in found]
    )
    call(evaluate, "--checkpoint", run, "--evaluation.last", "2")
    assert re.search(r"^  mean of last 2 +25\.50 ", capsys.readouterr().out, re.MULTILINE)


# --- ablations and searches


def test_ablations_and_trials_have_the_options_of_training(folders: dict[str, str]) -> None:
    """All but those that name a run, its seed, and the actors beside it."""
    several = {
        f"--{name.replace('_', '-')}": case.value
        for name, case in TRAINING.items()
        if name not in ("run.seed", "run.start_from", "train.steps")
    }
    changes = several | {
        "--data.extra-urls": "{black}",
        "--data.url": "{usual}",
        "--data.weights": "2 1",
        "--run.name": "r",
    }
    config = settings_of(changes, folders)
    reference, _ = ablation.configs_of(config, ["no-mirror"], [7])
    whole = {"scale_weights": None, "gamma": None, "ema_rate": None, "reduction": None, "learning_rate": (1e-4, 1e-1)}
    searched = SearchConfig.model_validate(config.model_dump() | {"search": whole})
    trial = space.run_settings(searched, {}, "trial-0000", 7)
    for run in (reference, trial):
        found = [name for name, _, _ in differences(config.model_dump(), run.model_dump())]
        assert set(found) <= {"run.name", "run.root", "run.seed", "evaluation.actors"} and run.run.seed == 7


# --- is any without a case?


# options whose case is a test of their own, one that fails where the option does nothing: by file and test
ELSEWHERE = {
    "tests/pipeline/data/test_loader.py": {
        "test_drop_last_reads_whole_batches_of_each_epoch": ["train: data.drop_last"],
        "test_states_how_many_steps_are_ready_ahead": ["train: data.ahead"],
    },
    "tests/pipeline/evaluation/test_pool.py": {
        "test_the_grid_shows_as_many_images_as_are_asked_for": [
            "train: evaluation.grid_images",
            "evaluate: evaluation.grid_images",
        ],
    },
    "tests/pipeline/run/test_ranking.py": {
        "test_ranks_by_the_metric_in_its_own_direction_and_puts_what_has_no_number_last": [
            "train: checkpoint.metric",
            "train: checkpoint.network",
        ],
        "test_the_first_protocol_ranks_and_the_test_split_does_not": ["train: evaluation.protocols"],
    },
    "tests/pipeline/run/test_history.py": {
        "test_keeps_the_last_the_best_and_what_is_not_scored_yet": [
            "train: checkpoint.keep_last",
            "train: checkpoint.keep_best",
        ],
        "test_the_table_of_a_run_is_the_chosen_checkpoint_s_beside_the_mean_of_the_last": ["train: evaluation.last"],
    },
    "tests/pipeline/evaluation/test_scorer.py": {
        "test_missing_lpips_weights_give_a_reason": [
            "train: evaluation.lpips",
            "train: evaluation.lpips_weights",
            "evaluate: evaluation.lpips_weights",
        ],
        "test_large_images_are_enhanced_in_tiles": ["train: evaluation.tile", "evaluate: evaluation.tile"],
    },
    "tests/pipeline/settings/test_files.py": {
        "test_presets_build": ["train: config"],
    },
    "tests/pipeline/training/test_engine.py": {
        "test_each_worker_may_normalise_by_its_own_batch": ["train: train.batch_norm"],
    },
    "tests/pipeline/training/test_topology.py": {
        "test_ranks_are_packed_by_node_and_each_has_the_gpu_that_ray_gave_it": ["train: run.use_gpu"],
    },
    "tests/pipeline/launch/test_capacity.py": {
        "test_actors_take_what_is_free": [
            "train: evaluation.actors",
            "train: evaluation.cpus_per_actor",
            "train: evaluation.gpus_per_actor",
        ],
        "test_runs_at_the_same_time_are_as_many_as_are_asked_for_and_share_the_cores": ["search: search.concurrent"],
        "test_a_node_that_joins_is_waited_for": ["train: run.wait_s"],
    },
    "tests/pipeline/training/test_loop.py": {
        "test_a_loss_that_stays_not_finite_stops_the_run_with_the_reason": ["train: train.nonfinite_limit"],
    },
    "tests/test_commands.py": {
        "test_dry_run_checks_everything_and_leaves_nothing": ["train: dry_run"],
        "test_mistakes_end_before_ray_starts": ["train: checkpoint.split"],
        "test_evaluate_scores_the_chosen_checkpoint_and_the_last_ones_on_the_test_split": ["evaluate: checkpoint"],
        "test_evaluate_compares_runs_checkpoints_and_pictures": ["evaluate: compare", "evaluate: json"],
        "test_evaluate_refuses_actors_that_the_cluster_has_no_room_for": ["evaluate: evaluation.gpus_per_actor"],
        "test_ablations_end_in_a_table_of_arms_over_seeds": [
            "ablate: arms",
            "ablate: seeds",
            "ablate: at_once",
            "report: runs",
            "report: out",
        ],
    },
    "tests/test_options.py": {
        "test_workers_share_a_run": ["train: run.workers"],
        "test_a_run_gives_up_after_as_many_failures_as_are_allowed": ["train: run.max_failures"],
        "test_options_of_scoring_pictures": [
            "evaluate: images",
            "evaluate: split",
            "evaluate: out",
            "evaluate: data.url",
            "evaluate: evaluation.protocols",
            "evaluate: evaluation.lpips",
            "evaluate: evaluation.actors",
            "evaluate: evaluation.cpus_per_actor",
        ],
        "test_the_mean_of_the_last_is_of_as_many_as_are_asked_for": ["evaluate: evaluation.last"],
        "test_photographs_go_where_they_are_asked_for": ["demo_photographs: out"],
    },
    "tests/test_search.py": {
        "test_eight_trials_over_real_pairs_stop_some_early_and_the_best_settings_train": ["search: dry_run"],
    },
    "tests/tune/test_conclusion.py": {
        "test_the_top_trials_are_trained_over_as_many_seeds_as_are_asked_for": [
            "search: search.top",
            "search: search.seeds",
        ],
    },
    "tests/tune/test_space.py": {
        "test_each_range_varies_its_own_setting_and_no_other": [
            "search: search.scale_weights",
            "search: search.gamma",
            "search: search.ema_rate",
            "search: search.beta",
            "search: search.mirror_weight",
            "search: search.learning_rate",
        ],
    },
    "tests/tune/test_pruning.py": {
        "test_with_one_objective_it_is_successive_halving": ["search: search.reduction"],
    },
    "tests/tune/test_study.py": {
        "test_no_more_trials_than_asked_for_however_they_ended": ["search: search.trials"],
        "test_of_two_objectives_the_front_comes_first_and_then_who_is_least_dominated": ["search: search.objectives"],
        "test_two_searches_share_a_database": ["search: search.database"],
    },
    "tests/tune/test_trials.py": {
        "test_time_that_is_over_leaves_trials_to_go_on_another_time": ["search: search.hours"],
        "test_a_known_optimum_is_found_and_better_than_at_random": ["search: search.sampler"],
    },
}
REFERENCES = {option: (file, test) for file, tests in ELSEWHERE.items() for test in tests for option in tests[test]}
CASES = (
    REFERENCES.keys()
    | {f"train: {name}" for name in TRAINING}
    | {f"pack: {name}" for name in PACKING}
    | {f"darken: {name}" for name in DARKENING}
)


def commands() -> dict[str, ModuleType]:
    """The modules that are run as commands, by name."""
    files = [path for folder in ("pipeline", "tune") for path in (ROOT / folder).glob("*.py")]
    mains = [path for path in files if 'if __name__ == "__main__"' in path.read_text()]
    return {path.stem: importlib.import_module(f"{path.parent.name}.{path.stem}") for path in mains}


def options_of(command: ModuleType) -> set[str]:
    """Names of all that a command takes, as its own parser knows them."""
    found: set[str] = set()

    def collect(parser: argparse.ArgumentParser, *_: object) -> None:
        found.update(action.dest for action in parser._actions if action.dest != "help")
        raise SystemExit

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(argparse.ArgumentParser, "parse_args", collect)
        call(command)
    return found


def test_every_option_of_every_command_has_a_case() -> None:
    found = {name: options_of(module) for name, module in commands().items()}
    shared = {name for name in found["train"] if "." in name or name == "config"}
    for command in ("ablate", "search"):  # they pass these on, as a test above sees
        assert shared <= found[command]
        found[command] -= shared
    every = {f"{command}: {name}" for command, names in found.items() for name in names}
    assert sorted(every - CASES) == [], "options without a case"
    assert sorted(CASES - every) == [], "cases without an option"


@pytest.mark.parametrize("option", REFERENCES)
def test_cases_elsewhere_exist_and_set_their_option(option: str) -> None:
    file, test = REFERENCES[option]
    assert test in source_of(file), f"{file} has no {test}"
    leaf = option.rpartition(" ")[2].rpartition(".")[2]
    assert re.search(leaf.replace("_", "[-_]"), source_of(file)[test]), f"{file}: {test} does not mention {leaf}"


@cache
def source_of(file: str) -> dict[str, str]:
    """The text of each test in a file, decorators included."""
    text = (ROOT / file).read_text()
    tests = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    lines = text.splitlines()
    starts = {test.name: min([test.lineno, *(each.lineno for each in test.decorator_list)]) for test in tests}
    return {test.name: "\n".join(lines[starts[test.name] - 1 : test.end_lineno]) for test in tests}
