"""What can be scored side by side: runs, checkpoints, and folders of pictures that any method made."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline import storage
from pipeline.data.manifest import PairRecord
from pipeline.images.codecs import read_rgb
from pipeline.packing.pairing import match_pictures
from pipeline.run import checkpoint, history, scores
from pipeline.run.history import Run
from pipeline.run.scores import Table, scores_file
from pipeline.settings.config import Config
from pipeline.settings.evaluation import Split
from pipeline.terminal import bullet_list


@dataclass(frozen=True)
class Candidate:
    """One of them.

    Attributes:
        url: a checkpoint's folder, or a folder of pictures.
        config: the settings beside the checkpoint; none for pictures.
        run: folder of the run that chose the checkpoint; none where the checkpoint was named itself.
    """

    url: str
    config: Config | None
    run: str | None

    @classmethod
    def find(cls, url: str, split: Split) -> "Candidate":
        """What lies at ``url``; of a run, the checkpoint that its development scores choose.

        Raises:
            ValueError: nothing to score, or a run that is not yet to be scored on the test split.
        """
        kind = checkpoint.kind_of(url)
        if kind is None:
            if not storage.listdir(url):
                raise ValueError(f"{url}: there is no run, checkpoint or folder of pictures")
            return cls(url, None, None)
        if not storage.exists(storage.join(url, checkpoint.SETTINGS)):
            raise ValueError(
                f"{url}: holds weights, but no {checkpoint.SETTINGS} that says of which network; copy its run's there"
            )
        config = checkpoint.read_config(url)
        if kind == "checkpoint":
            return cls(url, config, None)
        if split == "test" and not history.is_finished(url, config.train.steps):
            raise ValueError(
                f"{url}: is not finished, and its test scores are for the end, once; let the same training command end "
                "it, or name one of its checkpoints"
            )
        return cls(history.best_checkpoint(Run.load(url)), config, url)

    @property
    def home(self) -> str | None:
        """Folder of the run that wrote the checkpoint where it lies; none for pictures, and for a copy."""
        parent = self.url.rpartition("/")[0]
        is_own = self.config and checkpoint.step_of(storage.name_of(self.url)) is not None
        return parent if is_own and checkpoint.kind_of(parent) == "run" else None

    def ranking_rows(self, rows: Table) -> Table:
        """Those of its rows that stand for it: by the weights that its run ranks, or the student where it is alone."""
        wanted = self.config.checkpoint.network if self.config else "images"
        return rows[rows["method"] == (wanted if wanted in set(rows["method"]) else "student")]

    @property
    def name(self) -> str:
        """How tables call it: a run's folder with its checkpoint's, or the folder of pictures."""
        return "/".join(self.url.split("/")[-2 if self.config else -1 :])

    def table(self, split: Split) -> Table:
        """The stored scores of a checkpoint, of a copy by the copy's name; empty where there are none."""
        table = scores.read_or_empty(storage.join(self.url, scores_file(split)))
        return table.assign(checkpoint=storage.name_of(self.url))

    def with_newest(self, count: int) -> "list[Candidate]":
        """With the newest checkpoints of its run whose weights were kept, for their mean."""
        newest = checkpoint.complete_checkpoints(self.run)[-count:] if self.run and count else []
        return [self, *(replace(self, url=url, run=None) for url in newest if url != self.url)]


def pictures_of(folder: str, records: Sequence[PairRecord]) -> dict[str, Path]:
    """The picture of each pair in a local folder, by key.

    Raises:
        ValueError: one is missing, can't be read, or differs in size from the pair: nothing is resized.
    """
    if not storage.is_local(folder):
        raise ValueError(f"{folder}: pictures are read from a local folder; copy them to one")
    pictures = match_pictures(Path(folder), [record.key for record in records])
    problems = []
    for record in records:
        height, width, _ = read_rgb(pictures[record.key]).shape
        if (width, height) != (record.width, record.height):
            problems.append(
                f"{pictures[record.key]}: {width}x{height}, but {record.key} is {record.width}x{record.height}"
            )
    if problems:
        raise ValueError(f"pictures of other sizes than their pairs; nothing is resized:\n{bullet_list(problems)}")
    return pictures
