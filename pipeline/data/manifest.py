"""The two tables of a packed data set: what its shards are, and what each of its pairs is.

<url>/manifest.parquet   a row for each shard, which is all that training needs besides the shards; written last
<url>/pairs.parquet      a row for each pair, in the order of the shards and, within one, of the tar

The manifest holds the checksums of the shards and of the other table, so that its own stands for all the data.
"""

import dataclasses
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from pipeline import storage

MANIFEST_NAME, PAIRS_NAME = "manifest.parquet", "pairs.parquet"
SPLITS = ("train", "dev", "test")
COLUMN_TYPES: dict[Any, pa.DataType] = {str: pa.string(), int: pa.int64(), float: pa.float64()}
PAIRS_CHECKSUM = b"pairs_sha256"  # the manifest's note of the other table's SHA-256
ROWS_AT_ONCE = 65_536  # in the search for a split's pairs


@dataclass(frozen=True)
class ShardRecord:
    """One shard: a tar file of pairs of one split.

    Attributes:
        name: of the file, below the data set's URL.
        split: ``train``, ``dev`` or ``test``.
        pairs: how many it holds.
        size: of the file, in bytes.
        sha256: of the file, in hexadecimal.
        pixels: size of its decoded images, in bytes.
    """

    name: str
    split: str
    pairs: int
    size: int
    sha256: str
    pixels: int


@dataclass(frozen=True)
class PairRecord:
    """One pair: where it lies, how large and how bright it is, and what it is a duplicate of.

    Offsets and sizes are those of the members' data within the shard, in bytes; width and height are
    in pixels. Luminance is the mean over the image, in [0, 1]. SHA-256 is that of the stored PNG and
    the perceptual hash that of the pixels, both in hexadecimal. Pairs of one scene share ``scene``.
    """

    key: str
    shard: str
    low_offset: int
    low_size: int
    high_offset: int
    high_size: int
    width: int
    height: int
    low_luminance: float
    high_luminance: float
    low_sha256: str
    high_sha256: str
    low_phash: str
    high_phash: str
    scene: str
    split: str


def _schema(record: type, **types: pa.DataType) -> pa.Schema:
    """A column for each field of ``record``; ``types`` are those of the fields that are stored otherwise."""
    fields = {field.name: types.get(field.name, COLUMN_TYPES.get(field.type)) for field in dataclasses.fields(record)}
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields.items()])


SHARD_SCHEMA = _schema(ShardRecord, sha256=pa.binary(32))
PAIR_SCHEMA = _schema(PairRecord)


@dataclass(frozen=True, eq=False)
class Shards:
    """The shards of one split of the data set at ``url``, in the manifest's order.

    Kept by column, so that a hundred thousand of them cost a few megabytes: ``shards[i]`` is made when
    asked for. ``pairs``, ``sizes`` and ``pixels`` are what a ``ShardRecord`` tells of one shard, int64 [shards].
    """

    url: str
    split: str
    names: pa.Array
    checksums: pa.Array
    pairs: NDArray[np.int64]
    sizes: NDArray[np.int64]
    pixels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> ShardRecord:
        return ShardRecord(
            name=self.names[index].as_py(),
            split=self.split,
            pairs=int(self.pairs[index]),
            size=int(self.sizes[index]),
            sha256=self.checksums[index].as_py().hex(),
            pixels=int(self.pixels[index]),
        )


@dataclass(frozen=True, eq=False)
class Manifest:
    """The packed data set at ``url``.

    Attributes:
        url: its folder or prefix.
        checksum: SHA-256 of the manifest's bytes, and so of every image's.
        pairs_checksum: SHA-256 that ``pairs.parquet`` must have.
        shards: the manifest's table, a row for each shard.
    """

    url: str
    checksum: str
    pairs_checksum: str
    shards: pa.Table

    def split(self, name: str) -> Shards:
        """The shards of one split; a ``ValueError`` when there are none."""
        rows = self._rows(name)
        if not len(rows):
            counts = {split: int(_integers(self._rows(split), "pairs").sum()) for split in SPLITS}
            present = ", ".join(f"{split} ({count} pairs)" for split, count in counts.items() if count)
            raise ValueError(f"{self.url}: split {name!r} holds no pairs; this data set has {present}")
        names, checksums = (rows[column].combine_chunks() for column in ("name", "sha256"))
        pairs, sizes, pixels = (_integers(rows, column) for column in ("pairs", "size", "pixels"))
        return Shards(self.url, name, names, checksums, pairs, sizes, pixels)

    def pairs(self, split: str) -> tuple[PairRecord, ...]:
        """The pairs of one split in the order of the shards; a ``ValueError`` when there are none.

        Raises:
            ValueError: as ``pair_table``.
        """
        self.split(split)
        batches = self._pairs_file.iter_batches(ROWS_AT_ONCE, columns=PAIR_SCHEMA.names, use_threads=False)
        chosen = (batch.filter(pc.equal(batch["split"], split)) for batch in batches)
        return tuple(PairRecord(**row) for batch in chosen for row in batch.to_pylist())

    def pair_table(self, columns: Sequence[str]) -> pa.Table:
        """Some of the columns of all pairs, whatever their split.

        Raises:
            ValueError: ``pairs.parquet`` is missing, can't be read, or is not the one that was packed.
        """
        return self._pairs_file.read(columns=list(columns), use_threads=False)

    def _rows(self, split: str) -> pa.Table:
        assert split in SPLITS, split
        # no split's name begins another's, and a comparison would make a scalar (see `_integers`)
        return self.shards.filter(pc.starts_with(self.shards["split"], split))

    @cached_property
    def _pairs_file(self) -> pq.ParquetFile:
        where = storage.join(self.url, PAIRS_NAME)
        data = _read(where, "the manifest's table of pairs is missing; copy it too, or pack the data set again")
        if hashlib.sha256(data).hexdigest() != self.pairs_checksum:
            raise ValueError(
                f"{where}: is not the table that was packed (its SHA-256 differs from the manifest's note); copy the "
                "data set again or pack it again"
            )
        file = _parquet_file(data)
        _check_columns(where, file.schema_arrow, PAIR_SCHEMA)
        return file


def load_manifest(url: str) -> Manifest:
    """Read the manifest of the packed data set at ``url``.

    Raises:
        ValueError: it is missing, can't be read, or is not a manifest.
    """
    url = storage.absolute(url)
    where = storage.join(url, MANIFEST_NAME)
    data = _read(
        where, "there is no manifest; check the path and that packing finished, since the manifest is written last"
    )
    try:
        table = _parquet_file(data).read(use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{where}: is not a Parquet file ({error}); pack the data set again") from error
    _check_columns(where, table.schema, SHARD_SCHEMA)
    unknown = sorted(set(pc.unique(table["split"]).to_pylist()) - set(SPLITS))
    if unknown or not len(table):
        fault = f"has splits {', '.join(unknown)}" if unknown else "holds no pairs"
        raise ValueError(f"{where}: {fault}; pack the data set again")
    pairs_checksum = (table.schema.metadata or {}).get(PAIRS_CHECKSUM, b"").decode()
    return Manifest(url, hashlib.sha256(data).hexdigest(), pairs_checksum, table)


def write_manifest(url: str, shards: Sequence[ShardRecord], pairs: Sequence[PairRecord]) -> None:
    """Write both tables of the data set at ``url``, the manifest last; the same records give the same bytes."""
    pair_rows = _table_bytes([dataclasses.asdict(pair) for pair in pairs], PAIR_SCHEMA)
    shard_rows = [dataclasses.asdict(shard) | {"sha256": bytes.fromhex(shard.sha256)} for shard in shards]
    note = {PAIRS_CHECKSUM: hashlib.sha256(pair_rows).hexdigest()}
    storage.write_bytes(storage.join(url, PAIRS_NAME), pair_rows)
    storage.write_bytes(storage.join(url, MANIFEST_NAME), _table_bytes(shard_rows, SHARD_SCHEMA.with_metadata(note)))


def mean_luminance(pixels: NDArray[np.uint8]) -> float:
    """Mean BT.601 luminance in [0, 1] of an RGB image, uint8 [height, width, 3]."""
    # Sums of integers are exact, so the manifest's bytes don't depend on the order of a float summation.
    red, green, blue = (int(total) for total in pixels.sum(axis=(0, 1), dtype=np.int64))
    height, width, _ = pixels.shape
    luminance: float = (0.299 * red + 0.587 * green + 0.114 * blue) / (255 * height * width)
    return luminance


def perceptual_hash(pixels: NDArray[np.uint8]) -> str:
    """64-bit hash of an RGB image, uint8 [height, width, 3], as 16 hexadecimal digits.

    Which of the 8x8 lowest cosine frequencies of the 32x32 luminance exceed their median: images that
    look alike differ in few bits, whatever their size, exposure or compression; strangers in about 32.
    """
    small = Image.fromarray(pixels).convert("L").resize((32, 32), Image.Resampling.LANCZOS)
    frequency, position = np.arange(8)[:, None], np.arange(32)[None, :]
    cosines = np.cos(np.pi * frequency * (2 * position + 1) / 64)
    # Rounded, so that the noise of float arithmetic doesn't decide the bits of a flat image.
    spectrum = np.round(cosines @ np.asarray(small, dtype=np.float64) @ cosines.T, 3)
    return np.packbits(spectrum > np.median(spectrum)).tobytes().hex()


def _read(url: str, missing: str) -> bytes:
    try:
        return storage.read_bytes(url)
    except FileNotFoundError as error:
        raise ValueError(f"{url}: {missing} ({error})") from error
    except OSError as error:
        raise ValueError(f"{url}: cannot be read ({error})") from error


def _parquet_file(data: bytes) -> pq.ParquetFile:
    # Without reading ahead, and read without threads: pyarrow 26's pools can abort a short-lived process at its exit.
    return pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)


def _check_columns(url: str, found: pa.Schema, wanted: pa.Schema) -> None:
    present = {field.name: field for field in found}
    differing = [field.name for field in wanted if field.name not in present or present[field.name] != field]
    if differing:
        raise ValueError(
            f"{url}: columns missing or of another type: {', '.join(differing)}; another version packed it: "
            "pack the data set again"
        )


def _integers(table: pa.Table, column: str) -> NDArray[np.int64]:
    # not by to_numpy: wherever pyarrow makes Python's or numpy's values it imports pandas first, 0.3 s and 35 MB
    return np.from_dlpack(table[column].combine_chunks()).astype(np.int64, copy=False)


def _table_bytes(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> bytes:
    buffer = io.BytesIO()
    # of the columns with many values, dictionaries would only cost their readers memory
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer, compression="zstd", use_dictionary=["split"])
    return buffer.getvalue()
