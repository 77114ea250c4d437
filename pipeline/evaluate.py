"""Scores a checkpoint, the chosen one of a run, or any method's pictures on a packed split, or compares several.

python pipeline/evaluate.py --checkpoint ~/iaml-runs/lol_v1 --split test --json scores.json
python pipeline/evaluate.py --compare ~/iaml-runs/lol_v1 ~/iaml-runs/half pictures --split test
"""

from collections.abc import Sequence

import pandas as pd

from pipeline import storage, terminal
from pipeline.evaluation.candidates import Candidate
from pipeline.launch import scoring
from pipeline.reporting import tables
from pipeline.reporting.run_report import REPORT, write_report
from pipeline.reporting.table_json import as_json
from pipeline.reporting.text_table import TextTable
from pipeline.run import scores
from pipeline.run.history import Run
from pipeline.run.scores import Table
from pipeline.settings.command_line import parse_settings, user_errors
from pipeline.settings.evaluation import EvaluateSettings, Split


def main() -> None:
    """Score and print a table; a run's scores, pictures and report are stored with the run."""
    settings = parse_settings(EvaluateSettings, description=__doc__ or "")
    with user_errors():
        for file in filter(None, (settings.out, settings.json_file)):
            storage.check_writable(file.rpartition("/")[0])
        candidates = [Candidate.find(url, settings.split) for url in settings.urls]
        manifest = scoring.load_data(settings, candidates)
        chosen = scoring.score_candidates(settings, candidates, manifest)
        names = unique([candidate.name for candidate in candidates])
        (first, *others) = candidates
        if others:
            shown = [each.ranking_rows(rows) for each, rows in zip(candidates, chosen, strict=True)]
            scored = dict(zip(names, shown, strict=True))
            table, page = tables.candidates_table(scored), ""
        else:
            scored = dict(zip(names, chosen, strict=True))
            last = scoring.choose_settings(settings, candidates).last
            table, page = with_report(first, chosen[0], settings.split, last)
        terminal.log(f"\n{table}" + (f"\n\nreport: {page}" if page else ""))
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


def unique(names: Sequence[str]) -> list[str]:
    """The names, numbered where two are the same."""
    return [name if names.count(name) == 1 else f"{name} ({index + 1})" for index, name in enumerate(names)]


if __name__ == "__main__":
    main()
