"""What is checked before anything expensive starts: data sets, LPIPS weights, and every node of the cluster."""

from collections.abc import Sequence
from itertools import product

import pyarrow.compute as pc

from iaml.similarity import SIZES
from pipeline import storage, terminal
from pipeline.data.manifest import Manifest, Shards, load_manifest
from pipeline.data.order import order_of
from pipeline.evaluation.lpips import SMALLEST_SIDES
from pipeline.evaluation.lpips_weights import BackboneWeights
from pipeline.evaluation.scorer import find_lpips
from pipeline.launch.node_checks import check_nodes
from pipeline.settings.config import Config
from pipeline.settings.evaluation import EvaluationSettings
from pipeline.terminal import bullet_list


def check_data(config: Config) -> tuple[Manifest, ...]:
    """The manifests of ``config.data.urls``, once they are known to serve; ``ValueError`` with what to do otherwise."""
    manifests = tuple(load_manifest(url) for url in config.data.urls)
    _check_data(config, manifests)
    return manifests


def find_lpips_weights(evaluation: EvaluationSettings, ranking: str | None = None) -> BackboneWeights | str:
    """The LPIPS weights, or why there are none, as is said in one line; refuses to rank by a missing score."""
    found = find_lpips(evaluation)
    if isinstance(found, str):
        if ranking == "lpips":
            raise ValueError(f"checkpoint.metric is lpips, but LPIPS is not available: {found}")
        terminal.log(f"no LPIPS: {found}")
    else:
        terminal.log(f"LPIPS {found.backbone} from {found.source} (sha256 {found.sha256})")
    return found


def check_cluster(config: Config, manifests: Sequence[Manifest]) -> None:
    """``ValueError`` when a node of the cluster lacks packages, data or storage; problems are named for all nodes.

    Args:
        config: the run's settings, as ``capacity.choose_devices`` gave them.
        manifests: of the data sets.
    """
    cache = config.data.cache if config.data.cache_gib else None
    check_nodes(manifests, config.run.root, cache, use_gpu=bool(config.run.use_gpu))


def _check_data(config: Config, manifests: Sequence[Manifest]) -> None:
    """``ValueError``, with what to do, where a run cannot train on its data sets or be scored on the first one."""
    training = [manifest.split("train") for manifest in manifests]
    scored = manifests[0].split(config.checkpoint.split)
    order_of([shards.pairs for shards in training], config.data, config.train.global_batch, config.run.seed)
    _check_image_sizes(config, manifests[0])
    _refuse_leaks(manifests)
    if config.data.on_bad_data == "stop":
        _refuse_missing_shards([*training, scored])


def _check_image_sizes(config: Config, manifest: Manifest) -> None:
    """Refuse images that are too small for the score that ranks checkpoints; say so where another score needs more."""
    table = manifest.pair_table(["key", "split", "width", "height"])
    scored = table.filter(pc.equal(table["split"], config.checkpoint.split))
    sides = pc.min_element_wise(scored["width"], scored["height"])
    needed = {"SSIM": SIZES["gaussian"]}
    if config.evaluation.lpips != "none":
        needed["LPIPS"] = SMALLEST_SIDES[config.evaluation.lpips]
    for name, least in needed.items():
        small = scored.filter(pc.less(sides, least))
        if not len(small):
            continue
        keys = bullet_list(f"{row['key']}: {row['width']}x{row['height']}" for row in small.to_pylist())
        fault = (
            f"{manifest.url}: {name} needs images of at least {least}x{least}, {len(small)} of the "
            f"{config.checkpoint.split} split are smaller"
        )
        if name == "SSIM" or "lpips" in config.rankings:
            raise ValueError(f"{fault}, so that no checkpoint could be ranked; pack again without them:\n{keys}")
        terminal.log(f"no mean LPIPS: {fault}; pack again without them, or set evaluation.lpips: none:\n{keys}")


def _refuse_missing_shards(splits: Sequence[Shards]) -> None:
    for shards in splits:
        try:
            there = set(storage.listdir(shards.url))
        except OSError:  # who may read the objects of a bucket may not always list them
            continue
        missing = [name for name in shards.names.to_pylist() if name not in there]
        if missing:
            raise ValueError(
                f"{shards.url}: {len(missing)} of {len(shards)} shards of the {shards.split} split are missing; copy "
                f"them too, pack the data set again, or set data.on_bad_data: skip:\n{bullet_list(missing)}"
            )


def _refuse_leaks(manifests: Sequence[Manifest]) -> None:
    """Refuse held-out images of any data set that are training images of any; by column, for millions of pairs."""
    tables = {manifest.url: manifest.pair_table(["key", "split", "high_sha256"]) for manifest in manifests}
    for (url, table), (training_url, others) in product(tables.items(), repeat=2):
        held = table.filter(pc.not_equal(table["split"], "train"))
        trained = others.filter(pc.equal(others["split"], "train"))
        places = pc.index_in(held["high_sha256"], value_set=trained["high_sha256"])
        leaks = held.filter(pc.is_valid(places))
        if len(leaks):
            twins = trained["key"].take(pc.drop_null(places)[:5]).to_pylist()
            names = ", ".join(
                f"{leak['key']} ({leak['split']}) is {twin}"
                for leak, twin in zip(leaks[:5].to_pylist(), twins, strict=True)
            )
            place = "as well" if training_url == url else f"of {training_url}"
            raise ValueError(
                f"{url}: {len(leaks)} held-out images are training images {place}: {names}; pack again without them"
            )
