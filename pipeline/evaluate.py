"""Scores a checkpoint, the chosen one of a run, or any method's pictures on a packed split, or compares several.

python pipeline/evaluate.py --checkpoint ~/iaml-runs/lol_v1 --split test --json scores.json
python pipeline/evaluate.py --compare ~/iaml-runs/lol_v1 ~/iaml-runs/half pictures --split test
"""

from collections.abc import Sequence
from typing import Self

import pandas as pd
from pydantic import Field, model_validator

from iaml import Settings
from pipeline import storage, terminal
from pipeline.data.manifest import Manifest, load_manifest
from pipeline.evaluation.candidates import Candidate, pictures_of
from pipeline.evaluation.pool import Pool, sized
from pipeline.launch import capacity, trainer
from pipeline.launch.node_checks import check_nodes
from pipeline.reporting import tables
from pipeline.reporting.report import REPORT, write_report
from pipeline.reporting.table_json import as_json
from pipeline.reporting.tables import TextTable
from pipeline.run import scores
from pipeline.run.history import Run
from pipeline.run.scores import Table
from pipeline.settings.command_line import parse_settings, user_errors
from pipeline.settings.evaluation import EvaluationSettings, Split


class EvaluateData(Settings):
    """The data to score on."""

    url: storage.Url | None = Field(
        None, description="folder or s3://bucket/prefix that pipeline/pack.py wrote; by default the run's"
    )


class EvaluateSettings(Settings):
    """What to score, and on what."""

    checkpoint: storage.Url | None = Field(
        None, description="folder or s3:// URL of a checkpoint, or of a run for the one that its dev scores choose"
    )
    images: storage.Url | None = Field(
        None, description="folder of pictures that any method made, named as the pairs' low-light images were"
    )
    compare: tuple[storage.Url, ...] = Field(
        (), description="two or more runs, checkpoints or folders of pictures, compared image by image with the first"
    )
    split: Split = Field("dev", description="split to score; the test split is for the end, once")
    out: storage.Url | None = Field(None, description="Parquet file for each image's scores, besides the run's own")
    json_file: storage.Url | None = Field(
        None, alias="json", description="file for the printed table as JSON: each number unrounded, with its protocol"
    )
    data: EvaluateData = EvaluateData()
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="after")
    def _one_thing_to_do(self) -> Self:
        if sum(map(bool, (self.checkpoint, self.images, self.compare))) != 1:
            raise ValueError("give one of checkpoint, images and compare")
        if len(self.compare) == 1:
            raise ValueError("compare: needs two or more; to score one, use checkpoint or images")
        return self

    @model_validator(mode="after")
    def _every_field_has_an_effect(self) -> Self:
        given = self.evaluation.model_fields_set
        if "last" in given and not self.checkpoint:
            raise ValueError("evaluation.last: has an effect on a run's table alone, which checkpoint names")
        for name in ("tile", "grid_images"):
            if name in given and self.images:
                raise ValueError(f"evaluation.{name}: has no effect on pictures that are made already")
        return self

    @property
    def urls(self) -> tuple[str, ...]:
        """What is to be scored."""
        return self.compare or tuple(url for url in (self.checkpoint, self.images) if url)


def main() -> None:
    """Score and print a table; a run's scores, pictures and report are stored with the run."""
    settings = parse_settings(EvaluateSettings, description=__doc__ or "")
    with user_errors():
        for file in filter(None, (settings.out, settings.json_file)):
            storage.check_writable(file.rpartition("/")[0])
        candidates = [Candidate.find(url, settings.split) for url in settings.urls]
        manifest = load_data(settings, candidates)
        chosen = evaluate(settings, candidates, manifest)
        names = unique([candidate.name for candidate in candidates])
        (first, *others) = candidates
        if others:
            shown = [each.shown(rows) for each, rows in zip(candidates, chosen, strict=True)]
            scored = dict(zip(names, shown, strict=True))
            table, page = tables.candidates_table(scored), ""
        else:
            scored = dict(zip(names, chosen, strict=True))
            last = evaluation_settings(settings, candidates).last
            table, page = with_report(first, chosen[0], settings.split, last)
        terminal.say(f"\n{table}" + (f"\n\nreport: {page}" if page else ""))
        if settings.out:
            scores.write(settings.out, pd.concat(chosen))
        if settings.json_file:
            storage.write_text(settings.json_file, as_json(table, scored))


def with_report(candidate: Candidate, rows: Table, split: Split, last: int) -> tuple[TextTable, str]:
    """The table of one candidate's rows; of a run with the mean of the ``last``, and its report's URL, made anew."""
    if not candidate.run:
        return tables.checkpoint_table(rows), ""
    run, page = Run.load(candidate.run), storage.join(candidate.run, REPORT)
    write_report([run], page)
    of_split = run.scores[run.scores["split"] == split]
    return tables.checkpoint_table(rows, of_split, last), page


def evaluate(settings: EvaluateSettings, candidates: Sequence[Candidate], manifest: Manifest) -> list[Table]:
    """The rows of each candidate; what has been scored before is not scored again."""
    split, evaluation = settings.split, evaluation_settings(settings, candidates)
    records = manifest.pairs(split)
    keys = [record.key for record in records]
    pictures = {each.url: pictures_of(each.url, records) for each in candidates if each.config is None}
    lpips = trainer.check_scores(evaluation)
    columns = evaluation.columns(lpips=not isinstance(lpips, str))
    checksum = None if isinstance(lpips, str) else lpips.sha256

    def stored(candidate: Candidate) -> Table:
        table = candidate.table(split)
        measured = pd.MultiIndex.from_frame(table[["protocol", "metric"]]).isin(evaluation.columns())
        return table[(table["data"] == manifest.checksum) & measured]

    wanted = [
        each for candidate in candidates for each in candidate.with_newest(0 if settings.compare else evaluation.last)
    ]

    def waiting(conditions: str) -> list[Candidate]:
        return [each for each in wanted if not scores.covers(stored(each), keys, columns, checksum, conditions)]

    found: dict[str, Table] = {}
    known = {text for each in wanted for text in scores.conditions_of(stored(each))}
    if not any(not waiting(conditions) for conditions in known):  # where all have been scored alike is no matter
        actors = evaluation.actors or 1
        with trainer.cluster(actors * evaluation.cpus_per_actor, None):
            part = {"CPU": float(evaluation.cpus_per_actor), "GPU": evaluation.gpus_per_actor or 0.0}
            capacity.wait_for([part] * actors)
            capacity.check(actors * evaluation.cpus_per_actor, actors * (evaluation.gpus_per_actor or 0.0))
            check_nodes([manifest])
            evaluation = sized(evaluation, len(keys), list(capacity.free_on_nodes().values()))
            pool = Pool.start(evaluation, manifest, split, lpips)
            unlike = waiting(evaluation.conditions)
            for each in unlike:
                terminal.say(f"scoring {each.url}")
                if each.config:
                    found[each.url] = pool.score(each.url, progress=True)
                else:
                    found[each.url] = pool.score_pictures(each.url, pictures[each.url], progress=True)
        for run in {home for each in unlike if (home := each.home)}:
            scores.put_together(run)
    return [stored(each) if each.config else found[each.url] for each in candidates]


def data_url(settings: EvaluateSettings, candidates: Sequence[Candidate]) -> str:
    """The data set to score on: the one that is named, or else the one of the first run."""
    configs = [candidate.config for candidate in candidates if candidate.config]
    if settings.data.url is None and not configs:
        raise ValueError("data.url: needed to score pictures: the packed data set that they were made from")
    return settings.data.url or configs[0].data.url


def load_data(settings: EvaluateSettings, candidates: Sequence[Candidate]) -> Manifest:
    """The manifest of the data set to score on."""
    url = data_url(settings, candidates)
    try:
        return load_manifest(url)
    except ValueError as error:
        if settings.data.url:
            raise
        raise ValueError(f"{error}; if the run's data set was moved, give its place as data.url") from error


def evaluation_settings(settings: EvaluateSettings, candidates: Sequence[Candidate]) -> EvaluationSettings:
    """The first run's own settings, overridden by those that are given; actors as this cluster has room for."""
    given = settings.evaluation.model_dump(exclude_unset=True)
    own = candidates[0].config.evaluation.model_dump() if candidates[0].config else {}
    for name in ("actors", "gpus_per_actor", *(["lpips_weights"] if "lpips" in given else [])):
        own.pop(name, None)
    return EvaluationSettings.model_validate(own | given)


def unique(names: Sequence[str]) -> list[str]:
    """The names, numbered where two are the same."""
    return [name if names.count(name) == 1 else f"{name} ({index + 1})" for index, name in enumerate(names)]


if __name__ == "__main__":
    main()
