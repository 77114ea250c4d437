"""Measures the loader beside its peers in one run, and prints the tables: ``make bench``.

    make bench              on photographs that scikit-image carries
    make bench PAIRS=DIR    on a folder of pairs, such as LOL-v1's

Each contender has a process of its own on the same one core, and they take turns, so that all meet the same
disturbances. Figures are medians over the rounds, the lowest and the highest in brackets.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median

import alone
import contenders
from contenders import BATCH, CONTENDERS, CROP
from measure import Process, machine, spread, table
from s3 import S3Server
from workspace import Workspace, make_workspace

from pipeline import storage
from pipeline.settings.command_line import user_errors

ROUNDS, TURN_S = 5, 1.5
COLD_ROUNDS, STARTS, EPOCHS = 3, 3, 20
LEAST_RATIO = {"bare": 0.5, "torch": 20, "mosaic": 20, "webdataset": 20}
CORES = sorted(os.sched_getaffinity(0))[-2:]


def main() -> None:
    """Read the options, measure everything, print the tables and write them to a file."""
    parser = argparse.ArgumentParser(description="Measure the loader beside its peers.")
    parser.add_argument("--pairs", type=Path, help="folder of pairs; by default scikit-image's photographs are taken")
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    options = parser.parse_args()
    with user_errors(), tempfile.TemporaryDirectory(prefix="bench-") as root:
        workspace = make_workspace(Path(root), options.pairs)
        report = "\n\n".join([describe(workspace), compare_warm(workspace), measure_alone(workspace)])
    print(f"\n{report}")
    storage.write_text(str(options.out), f"{report}\n")


def describe(workspace: Workspace) -> str:
    """The machine, the data and the libraries that all contenders share."""
    shared = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "pillow"))
    return (
        f"{machine()}; {shared}; {workspace.description}; batches of {BATCH} pairs of {CROP}-pixel crops.\n"
        "Medians, with the lowest and the highest in brackets."
    )


def compare_warm(workspace: Workspace) -> str:
    """The table of all contenders on one core."""
    speeds = warm_speeds(workspace)
    rows = []
    for name, contender in CONTENDERS.items():
        workers = max(contender.workers, key=lambda workers: median(speeds[name, workers]))
        ratio = median(speeds["ours", 0]) / median(speeds[name, workers])
        rows.append(
            [
                contender.title + (f", {workers} loader processes" if len(contender.workers) > 1 else ""),
                version(contender.package) if contender.package else "",
                spread(speeds[name, workers]),
                f"{ratio:.2f}",
                verdict(ratio, at_least=LEAST_RATIO.get(name)),
            ]
        )
    return table(["warm, on one core", "version", "pairs/s", "this loader is times as fast", "target"], rows)


def warm_speeds(workspace: Workspace) -> dict[tuple[str, int], list[float]]:
    """Pairs/s in each round, by contender and its number of loader processes."""
    entries = [(name, workers) for name, contender in CONTENDERS.items() for workers in contender.workers]
    speeds: dict[tuple[str, int], list[float]] = {entry: [] for entry in entries}
    with ExitStack() as stack:
        processes = {entry: stack.enter_context(Process(CORES[-1:])) for entry in entries}
        for (name, workers), process in processes.items():
            progress(f"{CONTENDERS[name].title}: an epoch to check and to warm up")
            process.call(contenders.begin, name, workspace, workers)
        for round_ in range(ROUNDS):
            progress(f"all contenders by turns, round {round_ + 1} of {ROUNDS}")
            for entry, process in processes.items():
                speeds[entry].append(process.call(contenders.pairs_per_second, TURN_S))
    return speeds


def measure_alone(workspace: Workspace) -> str:
    """The table of what has no peer."""
    rows = []
    with s3_bucket() as bucket:
        rows += cold_rows(workspace, bucket)
        rows += first_batch_rows(workspace, bucket)
    rows += order_rows()
    rows += memory_rows(workspace)
    return table(["this loader", "measured", "target"], rows)


def cold_rows(workspace: Workspace, bucket: str) -> list[list[str]]:
    """Reading from S3 with nothing cached, beside decoding alone; both have two cores, and S3's server too."""
    url = storage.join(bucket, "shards")
    for path in sorted(workspace.shards.iterdir()):
        storage.write_bytes(storage.join(url, path.name), path.read_bytes())
    passes, decoding = [], []
    with Process(CORES) as reader, Process(CORES) as decoder:
        for round_ in range(COLD_ROUNDS):
            progress(f"cold from S3, round {round_ + 1} of {COLD_ROUNDS}")
            passes.append(reader.call(alone.cold_pairs_per_second, url, workspace.root / "cold-cache"))
            decoding.append(decoder.call(alone.decoded_pairs_per_second, workspace.shards))
    rows = [["decoding alone from memory, one thread, pairs/s", spread(decoding), ""]]
    for when, speeds in zip(("start included", "from its first batch on"), zip(*passes, strict=True), strict=True):
        ratio = median(speeds) / median(decoding)
        rows += [
            [f"first pass from S3 over HTTP, one decoding thread, {when}, pairs/s", spread(speeds), ""],
            ["as a part of decoding alone", f"{ratio:.2f}", verdict(ratio, at_least=0.9)],
        ]
    return rows


def first_batch_rows(workspace: Workspace, bucket: str) -> list[list[str]]:
    """The start on 100,000 shards, from the disk and from S3, each in a fresh process."""
    folder = workspace.new_folder("many-shards")
    alone.write_many_shards(workspace, folder)
    url = storage.join(bucket, "many-shards")
    for path in folder.iterdir():
        storage.write_bytes(storage.join(url, path.name), path.read_bytes())
    rows = []
    for place, source in (("disk", str(folder)), ("S3", url)):
        progress(f"first batch of 100,000 shards on {place}")
        starts = []
        for _ in range(STARTS):
            with Process(CORES) as process:
                starts.append(process.call(alone.first_batch, source, workspace.new_folder("start-cache")))
        seconds, beyond, own, peak = zip(*starts, strict=True)
        title = f"first batch of 100,000 shards on {place}"
        rows += [
            [f"{title}, s", spread(seconds, 2), verdict(median(seconds), at_most=2)],
            [f"{title}, peak memory beyond the imports, MB", spread(beyond), verdict(median(beyond), at_most=300)],
            [f"{title}, the same without mapped files, at its end, MB", spread(own), ""],
            [f"{title}, peak memory, MB", spread(peak), ""],
        ]
    return rows


def order_rows() -> list[list[str]]:
    """What the order over 100 million samples costs."""
    rows = []
    with Process(CORES[-1:]) as process:
        for block in (64, 8):
            times = [process.call(alone.order_microseconds, block) for _ in range(3)]
            title = f"order over 100 million samples in blocks of {block}"
            rows.append([f"{title}, µs for each sample", spread(times, 2), verdict(median(times), at_most=1)])
        peak = process.call(alone.order_memory, 64)
    return [*rows, ["order over 100 million samples, peak memory, MB", f"{peak:.1f}", ""]]


def memory_rows(workspace: Workspace) -> list[list[str]]:
    """A worker's memory over epochs, the first of which fills the cache."""
    progress(f"{EPOCHS} epochs")
    with Process(CORES) as process:
        epochs = process.call(alone.memory_by_epoch, workspace, EPOCHS)
    rows = []
    for what, figures in zip(
        ("of a worker's own", "resident, mapped files included"), zip(*epochs, strict=True), strict=True
    ):
        first, second, middle, last = (figures[epoch - 1] for epoch in (1, 2, EPOCHS // 2, EPOCHS))
        rows.append(
            [
                f"memory {what}, after epochs 1, 2, {EPOCHS // 2} and {EPOCHS}, MB",
                f"{first:.0f}, {second:.0f}, {middle:.0f}, {last:.0f}",
                f"growth since epoch {EPOCHS // 2} {verdict(last / middle - 1, at_most=0.02)}",
            ]
        )
    return rows


def verdict(value: float, at_least: float | None = None, at_most: float | None = None) -> str:
    """The target, and whether it is met."""
    if at_least is not None:
        return f"at least {at_least:g}: {'met' if value >= at_least else 'MISSED'}"
    if at_most is not None:
        return f"at most {at_most:g}: {'met' if value <= at_most else 'MISSED'}"
    return ""


def progress(text: str) -> None:
    """Say what is being measured."""
    print(text, flush=True)


@contextmanager
def s3_bucket() -> Iterator[str]:
    """URL of an empty bucket of an S3 server that runs for so long; processes started meanwhile reach it."""
    server = S3Server()
    before = dict(os.environ)
    os.environ.update(server.environment)
    try:
        yield server.make_bucket()
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.stop()


if __name__ == "__main__":
    main()
