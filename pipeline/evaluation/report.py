"""What a run achieved: a table for the terminal, and one HTML page that needs nothing but itself.

Two kinds of record come in, both plain JSON.

A *metric record* is one line of the training log:
    {"step": 100, "loss": 0.21, "reconstruction": 0.12, ..., "learning_rate": 2e-4, "grad_norm": 0.8,
     "images_per_s": 52.0, "ema_rate": 0.99}
Every number that is not one of `NOT_LOSSES` is a term of the loss.

A *scores* dict is one evaluation of one checkpoint on one split by one protocol:
    {"checkpoint": "step-000100", "step": 100, "split": "development", "protocol": "rgb_u8",
     "lpips": {"backbone": "alex", "source": "...", "sha256": "..."} or {"missing": "why"},
     "methods": {"input": {"psnr": 7.8, "ssim": 0.2, "lpips": 0.4}, "gamma": ..., "student": ...,
                 "averaged": ...},
     "images": [{"key": "22", "method": "student", "psnr": ..., "ssim": ..., "lpips": ...}, ...]}
An infinite PSNR is a float, which Python's json writes and reads as `Infinity`.
"""

import base64
import html
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

PANELS = {
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "ema_rate": "EMA rate",
    "images_per_s": "Images per second",
}
NOT_LOSSES = {"step", "epoch", *PANELS}
METRICS = {"psnr": ("PSNR dB", ".2f"), "ssim": ("SSIM", ".4f"), "lpips": ("LPIPS", ".4f")}
BASELINES = {"input", "gamma"}  # the same at every step, so no curves
LAST_CHECKPOINTS = 10
MOST_POINTS = 500  # a curve holds no more: longer ones show means of neighbours

Scores = Mapping[str, Any]
Record = Mapping[str, Any]
Points = Sequence[tuple[float, float]]


def format_table(scores: Scores) -> str:
    """The methods' scores as plain text, under a line that says what they are scores of.

    LPIPS has no column where it could not be computed; the reason is on the last line.
    """
    rows = [_columns(scores), *_cells(scores)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([_heading(scores), *lines, *_notes(scores)])


def render_report(
    title: str,
    settings_yaml: str,
    provenance: Mapping[str, Any],
    records: Sequence[Record],
    scores: Sequence[Scores],
    grids: Sequence[tuple[str, bytes]],
    *,
    chosen: str | None = None,
) -> str:
    """The report of a run as one HTML page, which loads nothing from anywhere.

    Args:
        title: the page's title.
        settings_yaml: the resolved settings, shown as they are.
        provenance: what else identifies the run (code, data, versions): names and values.
        records: metric records; where a step was done twice, after a restart, the later record counts.
        scores: scores dicts of any checkpoints, splits and protocols.
        grids: (caption, PNG) of each picture.
        chosen: the checkpoint whose scores head the page, by its name in `scores`; None: the latest.

    Raises:
        ValueError: if `chosen` is not among the scores.
    """
    sections = {
        "Scores": _summary(scores, chosen),
        "Scores over steps": "".join(_score_curves(scores)),
        "Training": "".join(_training_curves(records)),
        "Images": "".join(_picture("png", png, caption) for caption, png in grids),
        "Settings": f"<pre>{html.escape(settings_yaml)}</pre>",
        "Provenance": _provenance_table(provenance),
    }
    body = "\n".join(f"<section><h2>{name}</h2>\n{content}</section>" for name, content in sections.items() if content)
    return PAGE.format(title=html.escape(title), style=STYLE, body=body)


# What is said of one scores dict, for both the terminal and the page.


def _heading(scores: Scores) -> str:
    parts = [f"{name}: {scores[name]}" for name in ("checkpoint", "split", "protocol")]
    if "missing" not in scores["lpips"]:
        parts.append(f"LPIPS: {scores['lpips']['backbone']} (weights {scores['lpips']['sha256'][:8]})")
    images = len({image["key"] for image in scores["images"]})
    return ", ".join([*parts, f"{images} images"])


def _notes(scores: Scores) -> list[str]:
    missing = scores["lpips"].get("missing")
    return [f"LPIPS left out: {missing}"] if missing else []


def _columns(scores: Scores) -> list[str]:
    return ["method", *(METRICS[name][0] for name in _metrics(scores))]


def _cells(scores: Scores) -> list[list[str]]:
    return [
        [method, *(format(values[name], METRICS[name][1]) for name in _metrics(scores))]
        for method, values in scores["methods"].items()
    ]


def _metrics(scores: Scores) -> list[str]:
    return [name for name in METRICS if name != "lpips" or "missing" not in scores["lpips"]]


def _step(scores: Scores) -> int:
    return int(scores["step"])


def _kind(scores: Scores) -> tuple[str, str, str | None, tuple[str, ...]]:
    """What two scores dicts must share before their numbers may be averaged."""
    return (
        scores["split"],
        scores["protocol"],
        scores["lpips"].get("sha256"),
        tuple(sorted(scores["methods"])),
    )


# The page's sections.


def _summary(scores: Sequence[Scores], chosen: str | None) -> str:
    if not scores:
        return "<p>No checkpoint of this run has been scored.</p>"
    if chosen is None:
        chosen = max(scores, key=_step)["checkpoint"]
    of_chosen = [each for each in scores if each["checkpoint"] == chosen]
    if not of_chosen:
        scored = sorted({each["checkpoint"] for each in scores})
        raise ValueError(f"the checkpoint {chosen!r} is not among those scored: {', '.join(scored)}")
    tables = [table for each in of_chosen for table in (each, *_mean_of_last(each, scores))]
    return "".join(_scores_table(table) for table in tables)


def _mean_of_last(chosen: Scores, scores: Sequence[Scores]) -> list[Scores]:
    """Beside a chosen checkpoint, whose scores flatter the run, the mean of the run's last ones."""
    alike = [each for each in scores if _kind(each) == _kind(chosen)]
    last = [each["methods"] for each in sorted(alike, key=_step)[-LAST_CHECKPOINTS:]]
    if len(last) < 2:
        return []
    means = {
        method: {name: sum(methods[method][name] for methods in last) / len(last) for name in values}
        for method, values in chosen["methods"].items()
    }
    return [{**chosen, "checkpoint": f"mean of the last {len(last)}", "methods": means}]


def _scores_table(scores: Scores) -> str:
    head = "".join(f"<th>{column}</th>" for column in _columns(scores))
    rows = "".join(
        f"<tr><th>{html.escape(method)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for method, *cells in _cells(scores)
    )
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in _notes(scores))
    return f"<p>{html.escape(_heading(scores))}</p><table><tr>{head}</tr>{rows}</table>{notes}"


def _score_curves(scores: Sequence[Scores]) -> Iterable[str]:
    for name, (label, _) in METRICS.items():
        curves: dict[str, list[tuple[float, float]]] = {}
        for each in sorted(scores, key=_step):
            for method, values in each["methods"].items():
                if method not in BASELINES and name in values:
                    how = each["lpips"]["backbone"] if name == "lpips" else each["protocol"]
                    curves.setdefault(f"{method}, {each['split']}, {how}", []).append((each["step"], values[name]))
        yield from _plot(label, {key: points for key, points in curves.items() if len(points) > 1})


def _training_curves(records: Sequence[Record]) -> Iterable[str]:
    by_step = {record["step"]: record for record in records}
    curves: dict[str, list[tuple[float, float]]] = {}
    for step, record in sorted(by_step.items()):
        for name, value in record.items():
            if isinstance(value, int | float):
                curves.setdefault(name, []).append((step, value))
    yield from _plot("Loss and its terms", {k: v for k, v in curves.items() if k not in NOT_LOSSES}, log=True)
    for name, label in PANELS.items():
        yield from _plot(label, {k: v for k, v in curves.items() if k == name})


def _provenance_table(provenance: Mapping[str, Any]) -> str:
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in provenance.items()}
    rows = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>" for name, text in texts.items())
    return f"<table class=names>{rows}</table>" if rows else ""


# Pictures.


def _plot(caption: str, curves: Mapping[str, Points], *, log: bool = False) -> Iterable[str]:
    """One figure with all the curves, or none where there is nothing to draw."""
    drawable = {label: _thinned([p for p in points if math.isfinite(p[1])]) for label, points in curves.items()}
    drawable = {label: points for label, points in drawable.items() if points}
    if not drawable:
        return
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.add_subplot()
    for label, points in drawable.items():
        axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 30 else "", linewidth=1.2)
    if log and all(value > 0 for points in drawable.values() for _, value in points):
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    if len(drawable) > 1:
        axes.legend(fontsize="small")
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text as text, which is smaller
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    yield _picture("svg+xml", buffer.getvalue(), caption)


def _thinned(points: Points) -> Points:
    size = max(1, math.ceil(len(points) / MOST_POINTS))
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _picture(kind: str, content: bytes, caption: str) -> str:
    data = base64.b64encode(content).decode()
    text = html.escape(caption)
    image = f'<img alt="{text}" src="data:image/{kind};base64,{data}">'
    return f"<figure><figcaption>{text}</figcaption>{image}</figure>\n"


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem; color: #222; }
section { overflow-x: auto; }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; }
th, td { padding: 0.2rem 0.8rem; border-bottom: 1px solid #ddd; text-align: right; }
td { font-variant-numeric: tabular-nums; }
th:first-child, .names td { text-align: left; overflow-wrap: anywhere; }
figure { display: inline-block; margin: 0 0.5rem 1rem 0; max-width: 100%; vertical-align: top; }
img { max-width: 100%; height: auto; }
pre { overflow-x: auto; background: #f6f6f6; padding: 0.8rem; font-size: 0.85rem; }
"""
# The policy makes browsers refuse whatever would need a network.
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
