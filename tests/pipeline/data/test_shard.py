"""A shard is a plain tar: any WebDataset tool's is read, whatever the kind of its images; faults name the key."""

import io
import mmap
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipeline.data.shard import BadDataError, Shard, find_pairs

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def encoded(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


def tar_of(members):
    """A tar, mapped, of {name: bytes}."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return mapped(buffer.getvalue())


def mapped(data):
    memory = mmap.mmap(-1, len(data))
    memory[:] = data
    return memory


def shard_of(members):
    data = tar_of(members)
    return Shard("a.tar", data, find_pairs("a.tar", data))


def test_reads_what_webdataset_writes():
    buffer = io.BytesIO()
    with webdataset.TarWriter(buffer, encoder=False) as tar:
        for number in range(3):
            low, high = (encoded(Image.fromarray(PIXELS ^ value)) for value in (number, 255 - number))
            tar.write({"__key__": f"folder/{number}", "high.png": high, "json": b"{}", "low.png": low})
    data = mapped(buffer.getvalue())
    shard = Shard("a.tar", data, find_pairs("a.tar", data))
    assert [pair.key for pair in shard.pairs] == ["folder/0", "folder/1", "folder/2"]
    assert shard.areas() == [48, 48, 48]
    for number in range(3):
        low, clean = shard.decode(number)
        assert np.array_equal(low, PIXELS ^ number) and np.array_equal(clean, PIXELS ^ (255 - number))


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (Image.fromarray(PIXELS[:, :, 0]), "PNG", np.repeat(PIXELS[:, :, :1], 3, axis=2)),
        (Image.fromarray(np.dstack([PIXELS, PIXELS[:, :, 0]])), "PNG", PIXELS),
        (Image.fromarray(PIXELS[:, :, 0].astype(np.uint16) * 257), "PNG", np.repeat(PIXELS[:, :, :1], 3, axis=2)),
        (Image.fromarray(PIXELS), "WEBP", None),
        (Image.fromarray(PIXELS), "JPEG", None),
    ],
    ids=["grey", "alpha", "16 bits", "webp", "jpeg"],
)
def test_any_kind_of_image_becomes_8_bit_rgb(image, kind, expected):
    extension = kind.lower()
    data = encoded(image, kind)
    low, clean = shard_of({f"a.low.{extension}": data, f"a.high.{extension}": data}).decode(0)
    assert low.dtype == np.uint8 and low.shape == clean.shape == (6, 8, 3)
    assert expected is None or np.array_equal(low, expected)


def test_a_broken_image_names_shard_key_and_reason():
    whole = encoded(Image.fromarray(PIXELS))
    shard = shard_of({"one.low.png": whole, "one.high.png": whole, "two.low.png": whole, "two.high.png": whole[:60]})
    shard.decode(0)
    with pytest.raises(BadDataError, match=r"a\.tar: two\.high: .*truncated"):
        shard.decode(1)


def test_images_of_different_sizes_are_refused():
    low, high = encoded(Image.fromarray(PIXELS)), encoded(Image.fromarray(PIXELS[:5]))
    with pytest.raises(BadDataError, match=r"a\.tar: one: its images differ in size, \(6, 8\) and \(5, 8\)"):
        shard_of({"one.low.png": low, "one.high.png": high}).decode(0)


def test_a_sample_without_its_partner_is_named():
    with pytest.raises(BadDataError, match=r"a\.tar: one: has one\.low\.png, but needs a low and a high image"):
        find_pairs("a.tar", tar_of({"one.low.png": b"x"}))


@pytest.mark.parametrize("length", [100, 700, 1100])
def test_a_truncated_tar_is_refused(length):
    whole = tar_of({f"{key}.{side}.png": b"x" * 500 for key in "ab" for side in ("low", "high")})
    with pytest.raises(BadDataError, match=r"a\.tar: (is not a whole tar file|a: has a\.low\.png)"):
        find_pairs("a.tar", mapped(whole[:length]))
