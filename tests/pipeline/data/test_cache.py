"""The cache: shared, limited, never believed half-written, done without when the disk is full."""

import fcntl
import hashlib
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest

from pipeline.data.cache import LOCK, OWN_FOLDER, Cache, PixelFile
from pipeline.data.manifest import ShardRecord
from pipeline.data.pairs import PairPixels

SIZE = 5000
CONTENT = np.random.default_rng(0).bytes(SIZE)
OLD, NEW, NEXT = (f"{number:016x}-train" for number in range(3))
STRANGERS = ["my-photographs/a.raw", "notes/diary.txt", f"{OLD}/a.tar", "lost+found/1", ".DS_Store"]


def record(content=CONTENT, pairs=2):
    return ShardRecord("train-000000.tar", "train", pairs, len(content), hashlib.sha256(content).hexdigest(), 1000)


def make_cache(folder, limit=10**6, name=NEW, shards=SIZE, pixels=10_000):
    return Cache(folder, limit, name, shards, pixels)


def fill(cache, wanted, content=CONTENT):
    """Put a shard into the cache; whether there was room."""
    with cache.new_shard(wanted) as file:
        if file:
            for start in range(0, len(content), 2000):
                file.write(content[start : start + 2000], start)
            file.finish()
    return cache.shard(wanted) is not None


def pair(value, height=4, width=6):
    return PairPixels(*(np.full((height, width, 3), value + side, dtype=np.uint8) for side in range(2)))


def same(one, other):
    return one is not None and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_shard_is_there_once_it_is_whole(tmp_path):
    cache = make_cache(tmp_path)
    assert cache.shard(record()) is None
    assert fill(cache, record())
    assert cache.shard(record())[:] == CONTENT
    assert make_cache(tmp_path).shard(record())[:] == CONTENT


def test_a_fetch_that_fails_leaves_nothing_and_is_not_taken_for_a_full_disk(tmp_path):
    cache = make_cache(tmp_path)
    with pytest.raises(ConnectionError, match="gone"), cache.new_shard(record()) as file:
        file.write(CONTENT[:10], 0)
        raise ConnectionError("gone")
    assert cache.shard(record()) is None
    assert fill(cache, record())
    assert cache.shard(record())[:] == CONTENT


def test_decoded_pairs_come_back_also_in_another_process(tmp_path):
    pixels = make_cache(tmp_path).new_pixels(record(), [24, 40])
    pixels.put(1, pair(7, 5, 8))
    again = make_cache(tmp_path).pixels(record())
    assert again.get(0) is None and not again.complete
    assert same(again.get(1), pair(7, 5, 8))
    again.put(0, pair(9, 4, 6))
    assert pixels.complete and same(pixels.get(0), pair(9, 4, 6))


def test_a_pair_larger_than_its_slot_is_not_kept(tmp_path):
    pixels = make_cache(tmp_path).new_pixels(record(), [24, 0])
    pixels.put(0, pair(1, 5, 6))
    pixels.put(1, pair(1, 4, 6))
    assert pixels.get(0) is None and pixels.get(1) is None


def test_many_pairs_kept_at_once_are_all_written(tmp_path):
    cache = make_cache(tmp_path)
    pixels = cache.new_pixels(record(pairs=50), 50 * [24])
    for sample in range(50):
        cache.keep(pixels, sample, pair(sample))
    cache._writer.shutdown()
    again = make_cache(tmp_path).pixels(record(pairs=50))
    assert again.complete and all(same(again.get(sample), pair(sample)) for sample in range(50))


def test_changed_or_half_written_pixels_are_not_believed(tmp_path):
    cache = make_cache(tmp_path)
    pixels = cache.new_pixels(record(), [24, 24])
    pixels.put(0, pair(1))
    pixels.put(1, pair(3))
    file = next(tmp_path.glob(f"*/{NEW}/*.pixels"))
    with file.open("r+b") as handle:
        handle.seek(-1, 2)
        handle.write(b"\xff")  # in the second pair's clean image
    again = make_cache(tmp_path).pixels(record())
    assert same(again.get(0), pair(1)) and again.get(1) is None
    again.put(1, pair(3))
    assert same(make_cache(tmp_path).pixels(record()).get(1), pair(3))


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"\0" * len(data), lambda data: b""])
def test_a_pixel_file_without_its_header_or_end_is_made_anew(tmp_path, damage):
    make_cache(tmp_path).new_pixels(record(), [24, 24]).put(0, pair(1))
    file = next(tmp_path.glob(f"*/{NEW}/*.pixels"))
    file.write_bytes(damage(file.read_bytes()))
    cache = make_cache(tmp_path)
    assert cache.pixels(record()) is None
    pixels = cache.new_pixels(record(), [24, 24])
    assert pixels.get(0) is None
    pixels.put(0, pair(1))
    assert same(pixels.get(0), pair(1))


def test_decoded_images_are_kept_where_all_fit_and_shards_otherwise(tmp_path):
    assert make_cache(tmp_path / "a", limit=SIZE + 10_000).keeps_pixels
    cache = make_cache(tmp_path / "b", limit=SIZE + 9_999)
    assert not cache.keeps_pixels and fill(cache, record())
    assert "decoded images do not fit" in str(cache)
    assert make_cache(tmp_path / "c", limit=10_000, shards=0).keeps_pixels
    nothing = make_cache(tmp_path / "d", limit=9_999, shards=0)
    assert not nothing.keeps_pixels and "no room for this data set" in str(nothing)


def test_the_limit_holds_when_shards_do_not_all_fit(tmp_path):
    cache = make_cache(tmp_path, limit=12_500, shards=10 * SIZE, pixels=10**6)
    contents = [np.random.default_rng(number).bytes(SIZE) for number in range(10)]
    kept = [fill(cache, record(content), content) for content in contents]
    assert kept == [True, True] + 8 * [False]
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) <= 12_500
    assert cache.shard(record(contents[0]))[:] == contents[0]


def keep_for_later(folder, name, used):
    """Put a shard into a data set that nobody reads any more; its folder."""
    fill(make_cache(folder, name=name), record())
    found = folder / OWN_FOLDER / name
    os.utime(found / "in-use", (used, used))
    return found


def test_data_sets_that_nobody_reads_make_room_the_oldest_first(tmp_path):
    old, new = keep_for_later(tmp_path, OLD, used=0), keep_for_later(tmp_path, NEW, used=1)
    make_cache(tmp_path, limit=3 * SIZE + 100, name=NEXT, shards=SIZE, pixels=SIZE)
    assert not old.exists() and new.exists()


def test_a_data_set_in_use_keeps_its_room(tmp_path):
    reader = make_cache(tmp_path, name=OLD, limit=20_000)
    assert reader.keeps_pixels
    other = make_cache(tmp_path, name=NEXT, limit=20_000)
    assert not other.keeps_pixels and not fill(make_cache(tmp_path, name=NEW, limit=16_000), record())
    assert (tmp_path / OWN_FOLDER / OLD).exists()
    assert fill(reader, record())


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_others_have_in_the_folder_is_neither_touched_nor_counted(tmp_path, caplog):
    for name in STRANGERS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * SIZE)
    before = contents(tmp_path)
    cache = make_cache(tmp_path, limit=SIZE + 10_000)
    assert cache.keeps_pixels and fill(cache, record()) and not caplog.records
    after = contents(tmp_path)
    assert before.items() <= after.items()
    assert {path.relative_to(tmp_path).parts[0] for path in after.keys() - before.keys()} == {OWN_FOLDER}


def test_what_lies_astray_in_the_cache_stays_and_takes_no_room(tmp_path, caplog):
    old = keep_for_later(tmp_path, OLD, used=0)
    own = old.parent
    (own / f"{2:016x}-dev").mkdir()  # the name of a data set, without what the cache puts there first
    (own / f"{3:016x}-dev").write_text("a file where a folder should be")
    (own / f"{4:016x}-dev").symlink_to("nowhere")
    (own / f"{5:016x}-dev").mkdir()
    (own / f"{5:016x}-dev/in-use").mkdir()  # which can't be opened
    for folder in (own, own / "notes", old, own / f"{2:016x}-dev"):
        folder.mkdir(exist_ok=True)
        for name in (".nfs0001", ".DS_Store", "a.tar", f"{'0' * 64}.tar.gz"):
            (folder / name).write_bytes(b"x" * SIZE)
    (old / f"{'0' * 64}.pixels").symlink_to(own / "a.tar")
    strays = {path for path in own.rglob("*") if path.lstat().st_size == SIZE and record().sha256 not in path.name}
    cache = make_cache(tmp_path, limit=SIZE + 10_000)
    assert cache.keeps_pixels and not caplog.records
    assert all(path.exists() for path in strays) and len(strays) == 16
    assert sorted(path.name for path in old.iterdir()) == sorted(
        [".nfs0001", ".DS_Store", "a.tar", f"{'0' * 64}.tar.gz", f"{'0' * 64}.pixels"]
    ), "what the cache had put there is gone"


@pytest.mark.parametrize("tag", [None, "of another program"])
def test_a_folder_that_has_the_caches_name_but_is_not_its_own_is_left_alone(tag, tmp_path, caplog):
    own = tmp_path / OWN_FOLDER
    own.mkdir()
    (own / "notes").write_text("a user's")
    if tag:
        (own / "CACHEDIR.TAG").write_bytes(b"\xff" + tag.encode())
    before = contents(tmp_path)
    cache = make_cache(tmp_path)
    assert f"{own} holds somebody else's files; move them away; going on without it" in caplog.text
    assert not fill(cache, record()) and "not used" in str(cache)
    assert contents(tmp_path) == before


def test_processes_that_come_at_the_same_time_make_one_folder_that_is_the_caches(tmp_path, caplog):
    barrier = threading.Barrier(8)

    def come():
        barrier.wait()
        make_cache(tmp_path)

    threads = [threading.Thread(target=come) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not caplog.records
    assert [path.name for path in tmp_path.iterdir()] == [OWN_FOLDER]


@contextmanager
def full_disk():
    """No file may grow beyond 3,000 bytes, as on a disk that is full.

    Not a fixture, since pytest's own output would not fit either while a fixture lasts.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_said_once_and_done_without(tmp_path, caplog):
    content = CONTENT[:2000]
    cache = make_cache(tmp_path)
    with full_disk():
        kept = [fill(cache, record(content), content), fill(cache, record()), fill(cache, record())]
        pixels = cache.new_pixels(record(), [24, 24])
    assert kept == [True, False, False] and pixels is None
    assert [entry.message for entry in caplog.records].count(
        f"cache {tmp_path / OWN_FOLDER}: [Errno 27] File too large; going on without it"
    ) == 1
    assert cache.shard(record(content))[:] == content, "what is there is still read"


def test_a_disk_that_fills_up_while_images_are_kept_is_done_without(tmp_path, caplog):
    cache = make_cache(tmp_path)
    pixels = cache.new_pixels(record(), [24, 24])
    pixels._file.close()  # the kernel refuses to write, whatever the reason
    pixels._file = (tmp_path / OWN_FOLDER / LOCK).open("rb")
    cache.keep(pixels, 0, pair(1))
    cache._writer.shutdown()  # it writes in the background
    assert "going on without it" in caplog.text
    assert pixels.get(0) is None


def test_a_folder_that_cannot_be_made_is_done_without(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    cache = make_cache(tmp_path / "file/cache")
    assert "going on without it" in caplog.text
    assert not cache.keeps_pixels and not fill(cache, record()) and cache.shard(record()) is None


def test_workers_wait_for_the_one_that_fetches(tmp_path):
    fetched = []

    def work():
        cache = make_cache(tmp_path)
        with cache.new_shard(record()) as file:
            if file:
                fetched.append(1)
                time.sleep(0.2)
                file.write(CONTENT, 0)
                file.finish()
        assert cache.shard(record())[:] == CONTENT

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 1
    assert not list(tmp_path.glob(f"*/{NEW}/*.partial"))


WRITER = """
import sys, time
from pathlib import Path
from pipeline.data.cache import Cache
from pipeline.data.manifest import ShardRecord
cache = Cache(Path(sys.argv[1]), 10**6, sys.argv[3], 5000, 10_000)
with cache.new_shard(ShardRecord("train-000000.tar", "train", 2, 5000, sys.argv[2], 1000)) as file:
    file.write(bytes(4000), 0)
    print("half", flush=True)
    time.sleep(60)
"""


def test_a_writer_killed_half_way_leaves_nothing_that_is_believed_and_nobody_waiting(tmp_path):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path, record().sha256, NEW], stdout=subprocess.PIPE)
    assert writer.stdout.readline() == b"half\n"
    cache = make_cache(tmp_path)
    partial = next(tmp_path.glob(f"*/{NEW}/*.partial"))
    with partial.open("a") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert cache.shard(record()) is None
    assert fill(cache, record())
    assert cache.shard(record())[:] == CONTENT
    assert not list(tmp_path.glob(f"*/{NEW}/*.partial"))


def fill_for_ever(folder):
    """What a worker does to its cache, over and over."""
    cache = make_cache(folder, limit=10**9, shards=10**8, pixels=10**8)
    for number in range(10**6):
        content = np.random.default_rng(number).bytes(SIZE)
        fill(cache, record(content), content)
        pixels = cache.new_pixels(record(content), [24, 24])
        for sample in range(2):
            cache.keep(pixels, sample, pair(number % 200 + sample))


def test_killed_at_any_point_it_holds_nothing_wrong(tmp_path):
    delays = np.random.default_rng(0).uniform(0, 0.03, 20)
    whole = torn = 0
    for trial, delay in enumerate(delays):
        folder = tmp_path / str(trial)
        worker = multiprocessing.get_context("fork").Process(target=fill_for_ever, args=[folder])
        worker.start()
        while not list(folder.glob(f"*/{NEW}/*.tar")):
            time.sleep(0.001)
        time.sleep(delay)
        worker.kill()
        worker.join()
        cache = make_cache(folder, limit=10**9, shards=10**8, pixels=10**8)
        for number in range(len(list(folder.glob(f"*/{NEW}/*.tar"))) + 1):
            content = np.random.default_rng(number).bytes(SIZE)
            shard, pixels = cache.shard(record(content)), cache.pixels(record(content))
            assert shard is None or shard[:] == content
            found = [pixels.get(sample) if pixels else None for sample in range(2)]
            assert all(one is None or same(one, pair(number % 200 + sample)) for sample, one in enumerate(found))
            whole += shard is not None
            torn += None in found
        assert fill(cache, record(b"x" * SIZE), b"x" * SIZE), "no lock is left behind"
    assert whole and torn


def test_size_counts_header_slots_and_both_images():
    assert PixelFile.size([24, 40]) == 16 + 2 * 32 + 6 * 64
