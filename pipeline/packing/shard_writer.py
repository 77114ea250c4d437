"""Pack a folder of pairs into WebDataset shards and a manifest.

    source folder -> find pairs -> check every image -> group scenes -> cut the development split
      -> train-000000.tar ... dev-000000.tar ... test-000000.tar ... -> pairs.parquet -> manifest.parquet

Nothing is written before everything has been checked, and the manifest is written last: a folder
without one is not a data set.
"""

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from webdataset import TarWriter

from pipeline import storage
from pipeline.data.manifest import (
    MANIFEST_NAME,
    PAIRS_NAME,
    SPLITS,
    PairRecord,
    ShardRecord,
    load_manifest,
    mean_luminance,
    perceptual_hash,
    write_manifest,
)
from pipeline.images.codecs import read_image, to_stored_png
from pipeline.packing.pairing import PairPaths, find_pairs, unoriented_warning
from pipeline.packing.splits import CheckedPair, Plan, explain_missing_dev_split, plan_shards
from pipeline.settings.packing import PackSettings
from pipeline.terminal import bar, bullet_list

MISPAIRED_LOL_V1 = {"79", "111", "735"}
WORKERS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class PackReport:
    """What was packed. ``converted`` counts images, ``size`` is in bytes, pairs are named by key.

    ``unoriented`` are the files whose orientation can't be read; ``uncut`` says why no development split was cut.
    """

    pairs: Mapping[str, int]
    shards: Mapping[str, int]
    scenes: int
    size: int
    converted: int
    unoriented: tuple[Path, ...]
    uncut: str | None
    near_duplicates: tuple[tuple[str, str], ...]
    mispaired: tuple[str, ...]
    url: str
    checksum: str

    def __str__(self) -> str:
        """The report as text for the terminal."""
        lines = [f"{split:<6}{self.pairs[split]:>6} pairs in {self.shards[split]} shards" for split in SPLITS]
        lines.append(f"{self.scenes} scenes, {self.size / 1e6:.1f} MB")
        lines.append(f"{self.converted} images converted to 8-bit RGB PNG, the others copied byte for byte")
        if self.unoriented:
            lines.append(unoriented_warning(self.unoriented))
        if self.uncut:
            lines.append(f"WARNING: no development split, which training needs to choose checkpoints: {self.uncut}")
        if self.near_duplicates:
            lines.append(f"WARNING: {len(self.near_duplicates)} training pairs show a scene of the test split:")
            lines.append(bullet_list(f"{train} and {test}" for train, test in self.near_duplicates))
        if self.mispaired:
            lines.append(f"WARNING: known to be mispaired in LOL-v1: {', '.join(self.mispaired)}")
        lines += [f"data set {self.url}", f"checksum {self.checksum} (of the manifest)"]
        return "\n".join(lines)


def pack(settings: PackSettings) -> PackReport:
    """Write the shards of ``settings.source`` and their two tables below ``settings.out``.

    8-bit RGB PNGs are copied byte for byte, anything else becomes lossless 8-bit RGB PNG. The same
    source and settings give the same bytes.

    Raises:
        ValueError: a manifest is there already, the source has faults, all of which are named, or the
            storage can't be used.
    """
    try:
        return _pack(settings)
    except OSError as error:
        raise ValueError(
            f"out {settings.out}: the data set was not completed ({error}); pack again when that is repaired"
        ) from error


def check_images(pairs: Sequence[PairPaths]) -> list[CheckedPair]:
    """Decode every image once; one ``ValueError`` names all that can't be read or don't fit."""
    with ThreadPoolExecutor(WORKERS) as pool:
        results = list(bar(pool.map(_check, pairs), title="checking", total=len(pairs), unit="pair"))
    faults = [result for result in results if isinstance(result, str)]
    if faults:
        raise ValueError(
            "nothing was packed; repair or remove these pairs:\n" + "\n".join(f"  {fault}" for fault in faults)
        )
    return [result for result in results if isinstance(result, CheckedPair)]


def build_shard(members: Sequence[CheckedPair], plan: Plan) -> tuple[bytes, int]:
    """The bytes of one tar file and the number of images that had to be converted for it."""
    buffer = io.BytesIO()
    conversions = 0
    with (
        ThreadPoolExecutor(WORKERS) as pool,
        TarWriter(buffer, encoder=False, mtime=0, user="", group="", format="PAX_FORMAT") as tar,
    ):
        images = pool.map(to_stored_png, [path for one in members for path in (one.pair.low, one.pair.high)])
        for one in members:
            (low, low_converted), (high, high_converted) = next(images), next(images)
            conversions += low_converted + high_converted
            tar.write({"__key__": one.pair.key, "low.png": low, "high.png": high, "json": _describe(one, plan)})
    return buffer.getvalue(), conversions


def shard_record(name: str, tar: bytes, members: Sequence[CheckedPair], plan: Plan) -> ShardRecord:
    """The manifest's row for one shard, of which ``tar`` are the bytes."""
    return ShardRecord(
        name=name,
        split=plan.splits[members[0].pair.key],
        pairs=len(members),
        size=len(tar),
        sha256=hashlib.sha256(tar).hexdigest(),
        pixels=sum(2 * 3 * one.width * one.height for one in members),  # two images of a byte for each colour
    )


def pair_records(name: str, tar: bytes, members: Iterable[CheckedPair], plan: Plan) -> list[PairRecord]:
    """The rows for one shard's pairs, read back from the bytes of the tar file itself."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as file:
        places = {member.name: (member.offset_data, member.size) for member in file}
    records = []
    for one in members:
        key = one.pair.key
        low_offset, low_size = places[f"{key}.low.png"]
        high_offset, high_size = places[f"{key}.high.png"]
        record = PairRecord(
            key=key,
            shard=name,
            low_offset=low_offset,
            low_size=low_size,
            high_offset=high_offset,
            high_size=high_size,
            width=one.width,
            height=one.height,
            low_luminance=one.low_luminance,
            high_luminance=one.high_luminance,
            low_sha256=hashlib.sha256(tar[low_offset : low_offset + low_size]).hexdigest(),
            high_sha256=hashlib.sha256(tar[high_offset : high_offset + high_size]).hexdigest(),
            low_phash=one.low_phash,
            high_phash=one.high_phash,
            scene=plan.scenes[key],
            split=plan.splits[key],
        )
        records.append(record)
    return records


def _pack(settings: PackSettings) -> PackReport:
    out = settings.out
    manifest = storage.join(out, MANIFEST_NAME)
    if storage.exists(manifest):
        raise ValueError(f"{manifest} exists; choose another folder for out, or delete this one first")
    pairs = find_pairs(settings.source)
    storage.check_writable(out)
    checked = check_images(pairs)
    plan = plan_shards(checked, settings)
    _refuse_leftovers(out, plan)
    shards: list[ShardRecord] = []
    records: list[PairRecord] = []
    converted = 0
    for name, members in bar(plan.shards.items(), title="writing", total=len(plan.shards), unit="shard"):
        tar, conversions = build_shard(members, plan)
        _write_new(storage.join(out, name), tar)
        shards.append(shard_record(name, tar, members, plan))
        records += pair_records(name, tar, members, plan)
        converted += conversions
    write_manifest(out, shards, records)
    return _report(settings, checked, plan, sum(shard.size for shard in shards), converted)


def _check(pair: PairPaths) -> CheckedPair | str:
    """The pair, or what is wrong with it."""
    faults, images = [], []
    for path in (pair.low, pair.high):
        try:
            images.append(read_image(path))
        except ValueError as error:
            faults.append(str(error))
    if faults:
        return "; ".join(faults)
    low, high = (image.pixels for image in images)
    (height, width, _), (high_height, high_width, _) = low.shape, high.shape
    if low.shape != high.shape:
        return f"{pair.low} has {width}x{height} pixels but {pair.high} has {high_width}x{high_height}"
    return CheckedPair(
        pair,
        width,
        height,
        mean_luminance(low),
        mean_luminance(high),
        perceptual_hash(low),
        perceptual_hash(high),
        tuple(path for path, image in zip((pair.low, pair.high), images, strict=True) if not image.orientation_known),
    )


def _refuse_leftovers(out: str, plan: Plan) -> None:
    # A packing that was cut short leaves shards; a wildcard would read those that this one won't replace.
    present = storage.listdir(out)
    leftovers = [name for name in present if name.endswith(".tar") and name not in plan.shards]
    if PAIRS_NAME in present and not plan.shards.keys() <= set(present):  # it is written after all shards
        leftovers.append(PAIRS_NAME)
    if leftovers:
        raise ValueError(f"{out} holds shards of another packing; delete them first:\n{bullet_list(leftovers)}")


def _write_new(url: str, tar: bytes) -> None:
    """Write a shard, unless a packing that was cut short has: then it is the same to the byte."""
    if not storage.exists(url):
        storage.write_bytes(url, tar)
    elif storage.read_bytes(url) != tar:
        raise ValueError(f"{url} holds something else than this packing would; choose another folder or delete it")


def _describe(one: CheckedPair, plan: Plan) -> bytes:
    key = one.pair.key
    facts = {
        "key": key,
        "scene": plan.scenes[key],
        "split": plan.splits[key],
        "width": one.width,
        "height": one.height,
    }
    return json.dumps(facts).encode()


def _report(
    settings: PackSettings, checked: Sequence[CheckedPair], plan: Plan, size: int, converted: int
) -> PackReport:
    pairs = [one.pair for one in checked]
    keys_of_test: dict[str, list[str]] = {}
    for pair in pairs:
        if pair.split == "test":
            keys_of_test.setdefault(plan.scenes[pair.key], []).append(pair.key)
    training = [pair for pair in pairs if pair.split == "train"]
    counts = Counter(plan.splits.values())
    return PackReport(
        pairs={split: counts[split] for split in SPLITS},
        shards={split: sum(name.startswith(f"{split}-") for name in plan.shards) for split in SPLITS},
        scenes=len(set(plan.scenes.values())),
        size=size,
        converted=converted,
        unoriented=tuple(path for one in checked for path in one.unoriented),
        uncut=explain_missing_dev_split(plan, counts, settings),
        near_duplicates=tuple(
            (pair.key, test) for pair in training for test in keys_of_test.get(plan.scenes[pair.key], [])
        ),
        mispaired=tuple(
            pair.key
            for pair in training
            if pair.low.parent.parent.name.lower() == "our485" and pair.low.stem in MISPAIRED_LOL_V1
        ),
        url=settings.out,
        checksum=load_manifest(settings.out).checksum,
    )
