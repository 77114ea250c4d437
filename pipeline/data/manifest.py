"""The manifest: one Parquet row for each pair, saying where its bytes lie and what the pair looks like."""

import dataclasses
import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from pipeline import storage

MANIFEST_NAME = "manifest.parquet"
SPLITS = ("train", "dev", "test")
COLUMN_TYPES: dict[Any, pa.DataType] = {str: pa.string(), int: pa.int64(), float: pa.float64()}


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


SCHEMA = pa.schema(
    [pa.field(field.name, COLUMN_TYPES[field.type], nullable=False) for field in dataclasses.fields(PairRecord)]
)


@dataclass(frozen=True)
class Manifest:
    """The packed data set at ``url``. ``checksum`` is the SHA-256 of the manifest's bytes and so of every image's."""

    url: str
    checksum: str
    records: tuple[PairRecord, ...]

    def split(self, name: str) -> tuple[PairRecord, ...]:
        """The pairs of one split in the manifest's order; a ``ValueError`` when there are none."""
        found = tuple(record for record in self.records if record.split == name)
        if not found:
            counts = Counter(record.split for record in self.records)
            present = ", ".join(f"{split} ({counts[split]} pairs)" for split in SPLITS if split in counts)
            raise ValueError(f"{self.url}: split {name!r} holds no pairs; this data set has {present}")
        return found


def load_manifest(url: str) -> Manifest:
    """Read the manifest of the packed data set at ``url``.

    Raises:
        ValueError: it is missing, can't be read, or is not a manifest.
    """
    where = storage.join(storage.absolute(url), MANIFEST_NAME)
    try:
        data = storage.read_bytes(where)
    except FileNotFoundError as error:
        raise ValueError(
            f"{where}: there is no manifest; check the path and that packing finished, since it is written last"
        ) from error
    except OSError as error:
        raise ValueError(f"{where}: cannot be read ({error}); check the path, its permissions or S3 keys") from error
    return Manifest(url, hashlib.sha256(data).hexdigest(), _records(where, data))


def write_manifest(url: str, records: Sequence[PairRecord]) -> None:
    """Write the manifest of the data set at ``url``; the same records in the same order give the same bytes."""
    rows = [dataclasses.asdict(record) for record in records]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), buffer, compression="zstd")
    storage.write_bytes(storage.join(url, MANIFEST_NAME), buffer.getvalue())


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


def _records(url: str, data: bytes) -> tuple[PairRecord, ...]:
    try:
        # Without threads and reading ahead: pyarrow 26's pools can abort a short-lived process at its exit.
        table = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False).read(use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{url}: is not a Parquet file ({error}); pack the data set again") from error
    differing = [field.name for field in SCHEMA if not _holds(table, field)]
    if differing:
        raise ValueError(
            f"{url}: columns missing or of another type: {', '.join(differing)}; it is not a manifest of this"
            " version: pack the data set again"
        )
    records = tuple(PairRecord(**row) for row in table.select(SCHEMA.names).to_pylist())
    unknown = sorted({record.split for record in records} - set(SPLITS))
    if unknown or not records:
        fault = f"has splits {', '.join(unknown)}" if unknown else "holds no pairs"
        raise ValueError(f"{url}: {fault}; pack the data set again")
    return records


def _holds(table: pa.Table, field: pa.Field) -> bool:
    if field.name not in table.column_names:
        return False
    column = table.column(field.name)
    return bool(column.type == field.type and column.null_count == 0)
