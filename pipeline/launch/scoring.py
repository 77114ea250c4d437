"""Scores candidates on one split, by the data set and the settings of the first run unless others are given."""

from collections.abc import Sequence

import pandas as pd

from pipeline import terminal
from pipeline.data.manifest import Manifest, load_manifest
from pipeline.evaluation.candidates import Candidate, pictures_of
from pipeline.evaluation.pool import Pool
from pipeline.launch import capacity, cluster, preflight
from pipeline.launch.node_checks import check_nodes
from pipeline.run import scores
from pipeline.run.scores import Table
from pipeline.settings.evaluation import EvaluateSettings, EvaluationSettings


def score_candidates(settings: EvaluateSettings, candidates: Sequence[Candidate], manifest: Manifest) -> list[Table]:
    """The rows of each candidate; what has been scored before is not scored again."""
    split, evaluation = settings.split, choose_settings(settings, candidates)
    records = manifest.pairs(split)
    keys = [record.key for record in records]
    pictures = {each.url: pictures_of(each.url, records) for each in candidates if each.config is None}
    lpips = preflight.find_lpips_weights(evaluation)
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
        with cluster.session(capacity.cpus_for_actors(evaluation), None):
            evaluation = capacity.choose_actors(evaluation, len(keys))
            check_nodes([manifest])
            pool = Pool.start(evaluation, manifest, split, lpips)
            unlike = waiting(evaluation.conditions)
            for each in unlike:
                terminal.log(f"scoring {each.url}")
                if each.config:
                    found[each.url] = pool.score(each.url, progress=True)
                else:
                    found[each.url] = pool.score_pictures(each.url, pictures[each.url], progress=True)
        for run in {home for each in unlike if (home := each.home)}:
            scores.rebuild_run_table(run)
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


def choose_settings(settings: EvaluateSettings, candidates: Sequence[Candidate]) -> EvaluationSettings:
    """The first run's own settings, overridden by those that are given; actors as this cluster has room for."""
    given = settings.evaluation.model_dump(exclude_unset=True)
    own = candidates[0].config.evaluation.model_dump() if candidates[0].config else {}
    for name in ("actors", "gpus_per_actor", *(["lpips_weights"] if "lpips" in given else [])):
        own.pop(name, None)
    return EvaluationSettings.model_validate(own | given)
