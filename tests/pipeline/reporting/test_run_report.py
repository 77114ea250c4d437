"""The report page: of one run, of several, of runs that have hardly begun; and in a browser."""

import asyncio
import base64
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from contextlib import asynccontextmanager, suppress
from zlib import crc32

import aiohttp
import numpy as np
import pandas as pd
import pytest
from pages import HOSTILE, check_nesting, figures, find_hostile, rows_by_name, sections, texts
from PIL import Image

from pipeline import report
from pipeline.reporting import comparison
from pipeline.reporting.figures import MOST_POINTS, Line, draw
from pipeline.reporting.page.blocks import Table
from pipeline.reporting.page.render import render_page
from pipeline.reporting.run_report import render_report, write_report
from pipeline.run import checkpoint, record, scores
from pipeline.run.history import Run, arms
from pipeline.run.pictures import VIEWS, pictures_folder
from pipeline.settings.config import Config

KEYS = ("22", "23", "55")
FILE_NAME = HOSTILE.replace("/", "")
WEIGHTS = "443c5bc3" + 56 * "0"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome is installed")


def make_run(folder, name="first", steps=300, seed=0, mirror=0.8, manifest="5e5e", **config):
    """A run's folder with settings and provenance and nothing else."""
    tree = {
        "run": {"name": name, "root": str(folder), "seed": seed},
        "data": {"url": "/data"},
        "train": {"steps": steps},
        "objective": {"mirror_weight": mirror},
        **config,
    }
    run = folder / name
    run.mkdir()
    (run / checkpoint.SETTINGS).write_text(Config.model_validate(tree).to_yaml())
    (run / checkpoint.PROVENANCE).write_text(json.dumps({"git": "abc123", "manifest_sha256": [manifest]}))
    return run


def add_scores(
    run,
    step,
    split="dev",
    shift=0.0,
    data="5e5e",
    lpips=True,
    special=None,
    device="cpu",
    keys=KEYS,
    reason="no <alex> here",
):
    """Scores of a checkpoint; the student's PSNR is 20 dB and ``shift``, less for later images."""
    common = {"checkpoint": checkpoint.name_at(step), "step": step, "split": split, "data": data}
    common |= {"device": device, "precision": "float32"}
    rows = []
    for method, start in {"input": 7.0, "gamma": 14.0, "student": 20.0 + shift, "averaged": 21.0 + shift}.items():
        for index, key in enumerate(keys):
            psnr = (special or {}).get((method, key), start - index)
            image = common | {"key": key, "method": method, "libraries": "torch 2"}
            rows.append(image | {"metric": "psnr", "protocol": "rgb_u8", "value": psnr})
            rows.append(image | {"metric": "ssim", "protocol": "rgb_u8", "value": psnr / 40})
            distance = {"value": 0.1, "lpips_sha256": WEIGHTS} if lpips else {"value": None, "reason": reason}
            rows.append(image | {"metric": "lpips", "protocol": "alex", **distance})
    folder = run / checkpoint.name_at(step)
    scores.write(str(folder / scores.scores_file(split)), scores.to_table(rows))


def add_pictures(run, step, split="dev", keys=KEYS):
    """Small pictures of all views, each one different from the others; low and clean are the same at every step."""
    folder = run / checkpoint.name_at(step) / pictures_folder(split)
    folder.mkdir(parents=True)
    for key in keys:
        for number, view in enumerate(VIEWS):
            draw = np.random.default_rng([crc32(key.encode()), number, step if view in ("enhanced", "error") else 0])
            picture = Image.fromarray(draw.integers(0, 255, (24, 32, 3), dtype=np.uint8))
            picture.save(folder / f"{key}.{view}.webp", "WEBP", quality=50)


def add_metrics(run, records):
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def records(steps, scale=1.0):
    constants = {"learning_rate": 2e-4, "grad_norm": 0.5, "images_per_s": 50.0, "ema_rate": 0.99}
    return [{"step": step, "loss": scale / step, "mirror": 0.1 / step} | constants for step in range(1, steps + 1)]


def whole_run(folder, **settings):
    run = make_run(folder, **settings)
    add_metrics(run, records(300))
    for step, shift in ((100, 0.0), (200, 3.0), (300, 1.0)):
        add_scores(run, step, shift=shift)
        add_pictures(run, step)
    add_scores(run, 200, "test", shift=2.0)
    add_pictures(run, 200, "test", KEYS[:1])
    return run


def rendered(*runs):
    return render_report([Run.load(str(run)) for run in runs])


def test_a_run_that_moved_says_which_checkpoints_did_not_compete(tmp_path):
    run = whole_run(tmp_path)
    for step, shift in ((400, 1.5), (500, 0.5)):
        add_scores(run, step, shift=shift, device="NVIDIA H100")
    html = rendered(run)
    assert "checkpoint-00000400, the best of 2 by the PSNR" in html
    assert "3 more were scored on another kind of device, before the run was moved." in html
    assert "scored on: NVIDIA H100" in html
    assert "NVIDIA H100, float32\ncpu, float32" in sections(html)["Provenance"]
    assert "another kind of device" not in rendered(whole_run(tmp_path, name="other"))


def test_the_page_of_a_run_holds_every_part_and_loads_nothing(tmp_path):
    html = rendered(whole_run(tmp_path))
    check_nesting(html)
    assert all(found.startswith(("data:image/", "#")) for found in re.findall(r'(?:src|href)="?([^">]{0,20})', html))
    assert not re.search(r"<link|@import|url\(|javascript:| on[a-z]+=", html)
    assert [*figures(sections(html)["Scores over steps"])] == [
        "PSNR dB (rgb_u8), dev",
        "SSIM (rgb_u8), dev",
        "LPIPS (alex), dev",
    ]
    assert [*figures(sections(html)["Training"])] == [
        *("Loss and its terms", "Learning rate", "Gradient norm", "EMA rate of the teacher", "Images per second")
    ]
    psnr = figures(html)["PSNR dB (rgb_u8), dev"]
    assert all(f">{label}<" in psnr for label in ("student", "averaged", "input", "gamma", "chosen: step 200"))
    assert "finished: 300 steps" in html and "abc123" in html and WEIGHTS in sections(html)["Provenance"]
    assert rows_by_name(sections(html)["Settings"])["train.steps"] == ["300", "none"]
    assert "mirror_weight: 0.8" in sections(html)["Settings"]


def test_the_policy_admits_the_one_script_alone(tmp_path):
    html = rendered(make_run(tmp_path))
    (script,) = re.findall("<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert f"script-src 'sha256-{digest}';" in policy


def test_the_chosen_checkpoint_stands_beside_the_mean_of_the_last(tmp_path):
    html = sections(rendered(whole_run(tmp_path)))["Scores"]
    assert "checkpoint-00000200, the best of 3 by the PSNR of its student weights" in html
    dev, test = html.split("On the test split")
    assert rows_by_name(dev)["student"] == ["22.00", "0.5500", "0.1000"]
    assert rows_by_name(dev)["  mean of last 3"][0] == "21.33"  # of the averaged weights, whose row is the last
    assert rows_by_name(test)["student"][0] == "21.00" and "mean of last" not in test


def test_images_are_shown_worst_first_and_embedded_once(tmp_path):
    html = rendered(whole_run(tmp_path))
    images = sections(html)["Images"]
    assert re.findall("<h3>(.*?)</h3>", images) == [
        *("55: rank 3 of 3 on dev", "23: rank 2 of 3 on dev", "22: rank 1 of 3 on dev", "22: rank 1 of 3 on test")
    ]
    assert "<b>enhanced</b> PSNR\N{NO-BREAK SPACE}dB\N{NO-BREAK SPACE}21.00," in images
    assert "<b>low</b> PSNR\N{NO-BREAK SPACE}dB\N{NO-BREAK SPACE}5.00," in images
    pictures = re.findall(r'src="(data:image/webp[^"]*)"', html)
    assert len(pictures) == len(set(pictures))
    over_training = sections(html)["Images over training"]
    assert re.findall("<b>(.*?)</b>", over_training) == ["step 100", "step 200 (chosen)", "step 300", "clean"] * 3
    known = set(re.findall(r'id="(picture-\d+)"', html))
    assert known >= set(re.findall(r'data-same="([^"]*)"', html)) != set()


def test_images_over_training_are_those_of_every_checkpoint_at_a_few_of_them(tmp_path):
    run = make_run(tmp_path)
    for step in range(10, 101, 10):
        add_scores(run, step)
        add_pictures(run, step, keys=KEYS[:2] if step == 50 else KEYS[1:])
    html = sections(rendered(run))["Images over training"]
    assert re.findall("<h3>(.*?)</h3>", html) == ["23"]
    assert re.findall("<b>step (\\d+)", html) == ["10", "30", "50", "80", "100"]


@pytest.mark.parametrize("several", [False, True])
def test_runs_without_scores_metrics_and_pictures_have_a_page(tmp_path, several):
    runs = [make_run(tmp_path, "one"), make_run(tmp_path, "two", seed=1)][: 1 + several]
    html = rendered(*runs)
    check_nesting(html)
    assert "<img" not in html and "step 0 of 300" in html
    assert ("not scored on it yet: one, two" if several else "No checkpoint of this run has been scored yet") in html


def test_why_a_run_stopped_is_said_first(tmp_path):
    run = make_run(tmp_path)
    (run / record.STOPPED).write_text("10 steps <in> a row")
    add_metrics(run, records(7))
    assert "Training stopped: 10 steps &lt;in&gt; a row" in rendered(run).split("<section")[0]
    assert "first stopped: 10 steps &lt;in&gt; a row" in rendered(run, make_run(tmp_path, "second", seed=1))
    assert "step 7 of 300" in rendered(run)


def test_numbers_that_are_not_finite_are_shown_and_break_nothing(tmp_path):
    run = make_run(tmp_path)
    add_metrics(run, [{"step": 1, "loss": math.nan, "grad_norm": math.inf}, {"step": 2, "loss": 1.0, "grad_norm": 1.0}])
    add_scores(run, 100, special={("student", "23"): math.inf})
    add_scores(run, 200, special={("student", "55"): math.nan})
    add_pictures(run, 100)
    html = rendered(run)
    check_nesting(html)
    assert rows_by_name(sections(html)["Scores"])["student"][:2] == ["inf", "inf"]
    assert rows_by_name(sections(html)["Scores of each image"])["23"][0] == "inf"
    assert re.findall("<h3>(.*?):", sections(html)["Images"]) == ["55", "22", "23"]
    assert all(not re.search(r"\b(nan|inf)\b", svg) for svg in figures(html).values())


def test_lpips_without_weights_is_left_out_with_the_reason(tmp_path):
    run = make_run(tmp_path)
    add_scores(run, 100, lpips=False)
    html = rendered(run)
    assert "LPIPS left out: no &lt;alex&gt; here" in sections(html)["Scores"]
    assert len(rows_by_name(sections(html)["Scores"])["student"]) == 2
    assert "LPIPS (alex), dev" not in figures(html)


def test_texts_from_files_are_escaped(tmp_path):
    run = make_run(tmp_path, data={"url": "/<b>&"})
    provenance = {"<u>": {"x": "<s>"}, "git": '"><script>alert(1)</script>', "manifest_sha256": ["5e5e"]}
    (run / checkpoint.PROVENANCE).write_text(json.dumps(provenance))
    add_metrics(run, [{"step": step, "loss": 1.0, '<q>"$x_$': 2.0} for step in (1, 2)])
    add_scores(run, 100)
    html = rendered(run)
    check_nesting(html)
    assert html.count("<script>") == 1
    assert not any(tag in html for tag in ("/<b>", "<u>", "<s>", "<q>"))
    assert "&lt;q&gt;" in figures(html)["Loss and its terms"]


def hostile_run(folder, name, **settings):
    """A run in which a script stands wherever there may be a text."""
    run = make_run(folder, name, data={"url": f"/{HOSTILE}"}, **settings).rename(folder / f"{name}{FILE_NAME}")
    provenance = {"git": HOSTILE, HOSTILE: {HOSTILE: HOSTILE}, "manifest_sha256": ["5e5e"]}
    (run / checkpoint.PROVENANCE).write_text(json.dumps(provenance))
    (run / record.STOPPED).write_text(HOSTILE)
    add_metrics(run, [{"step": step, "loss": 1.0, HOSTILE: 2.0} for step in (1, 2)])
    for step in (100, 200):
        add_scores(run, step, keys=(HOSTILE, FILE_NAME), device=HOSTILE, lpips=False, reason=HOSTILE)
        add_pictures(run, step, keys=(FILE_NAME,))
    return run


def test_no_text_of_a_run_becomes_a_part_of_its_page(tmp_path):
    html = rendered(hostile_run(tmp_path, "one"))
    assert find_hostile(html) == {"Scores", "Scores of each image", "Settings", "Provenance"}
    head = texts(html.split("<section")[0])
    assert f"Training stopped: {HOSTILE}" in head and f"one{FILE_NAME}" in head
    shown = texts(sections(html)["Images"])
    assert f"{FILE_NAME}: rank 2 of 2 on dev" in shown and f"boundary between the pictures {FILE_NAME}" in shown


def test_no_text_of_several_runs_becomes_a_part_of_their_page(tmp_path):
    runs = [Run.load(str(hostile_run(tmp_path, name, mirror=mirror))) for name, mirror in (("one", 0.8), ("two", 0.0))]
    html = comparison.render({HOSTILE: {0: runs[0]}, f"not {HOSTILE}": {0: runs[1]}})
    assert find_hostile(html) == {"Scores", "What differs", "Training", "An image by each arm", "Runs"}
    head = texts(html.split("<section")[0])
    assert all(f"{name}{FILE_NAME} stopped: {HOSTILE}" in head for name in ("one", "two"))
    assert f"two{FILE_NAME}" in texts(sections(html)["Runs"])


def test_a_step_recorded_twice_counts_once_and_long_logs_stay_small(tmp_path):
    run = make_run(tmp_path, steps=9000)
    add_metrics(run, [*records(8000, scale=100.0), *records(8000)])
    svg = figures(rendered(run))["Loss and its terms"]
    assert svg.count("\nL ") < 2.5 * MOST_POINTS
    assert "100" not in re.findall("<text[^>]*>(.*?)</text>", svg)  # the first records' loss is drawn nowhere


def test_arms_are_compared_over_seeds_by_chosen_and_by_last_checkpoints(tmp_path):
    runs = []
    for name, mirror, gain in (("with", 0.8, 1.0), ("without", 0.0, 0.0)):
        for seed in (0, 1):
            run = make_run(tmp_path, f"{name}-{seed}", seed=seed, mirror=mirror)
            add_metrics(run, records(100))
            for step, shift in ((100, 0.0), (200, 2.0), (300, 1.0)):
                add_scores(run, step, shift=gain + shift + 0.1 * seed)
                add_pictures(run, step)
            runs.append(run)
    assert str(comparison.chosen_table(arms([Run.load(str(run)) for run in runs]), "dev")).startswith(
        "chosen checkpoints, student weights, split: dev"
    )
    html = rendered(*runs)
    check_nesting(html)
    chosen, last = sections(html)["Scores"].split("Mean of the last 3 checkpoints on the dev split")
    assert rows_by_name(chosen)["reference"][:3] == ["2", "22.05 ± 0.07", ""]
    assert rows_by_name(last)["reference"][:2] == ["2", "21.05 ± 0.07"]
    assert rows_by_name(chosen)["mirror_weight 0.0"][:2] == ["2", "21.05 ± 0.07"]
    assert rows_by_name(chosen)["mirror_weight 0.0"][2].startswith("-1.00")
    assert rows_by_name(sections(html)["What differs"]) == {"reference": ["0.8"], "mirror_weight 0.0": ["0.0"]}
    assert [*figures(html)][:4] == [
        *("PSNR dB (rgb_u8), dev, student weights", "SSIM (rgb_u8), dev, student weights"),
        *("LPIPS (alex), dev, student weights", "Loss"),
    ]
    assert rows_by_name(sections(html)["Runs"])["without-1"] == [
        *("mirror_weight 0.0", "1", "finished: 300 steps", "checkpoint-00000200", "21.10", "0.5275", "0.1000")
    ]
    assert re.findall("<b>(.*?)</b>", sections(html)["An image by each arm"])[:2] == ["reference", "mirror_weight 0.0"]
    assert "55: of the images pictured by each arm the worst of with-0, rank 3 of 3" in html


def test_scores_on_other_data_or_without_lpips_do_not_enter_the_mean_of_the_last(tmp_path):
    runs = [make_run(tmp_path, "one"), make_run(tmp_path, "two", seed=1)]
    for run in runs:
        add_scores(run, 50, data="6f6f", shift=-9.0)
        add_scores(run, 100, lpips=False, shift=-9.0)
        add_scores(run, 200)
        add_scores(run, 300)
    last = sections(rendered(*runs))["Scores"].split("Mean of the last 2 checkpoints on the dev split")[1]
    assert rows_by_name(last)["reference"][1] == "19.00 ± 0.00"


def test_runs_scored_on_different_data_are_not_compared(tmp_path):
    runs = [make_run(tmp_path, "one"), make_run(tmp_path, "two", mirror=0.5, manifest="6f6f")]
    for run, data in zip(runs, ("5e5e", "6f6f"), strict=True):
        add_scores(run, 100, data=data)
    with pytest.raises(ValueError, match="was scored on another data set"):
        rendered(*runs)


def test_an_image_that_one_checkpoint_could_not_score_has_no_mean_but_a_reason(tmp_path):
    run = make_run(tmp_path)
    for step in (100, 200, 300):
        add_scores(run, step, shift=step / 100, lpips=step < 300)
    table = comparison.mean_of_newest(Run.load(str(run)).scores, 2)
    student = table[(table["method"] == "student") & (table["key"] == "22")].set_index("metric")
    assert student.at["psnr", "value"] == 22.5
    assert math.isnan(student.at["lpips", "value"]) and student.at["lpips", "reason"] == "no <alex> here"


def test_the_band_of_an_arm_spans_its_seeds_at_their_common_steps():
    line = Line.of_seeds(
        "arm", [pd.Series({1: 1.0, 2: 2.0, 3: 3.0}), pd.Series({2: 4.0, 3: 5.0}), pd.Series(dtype=float)]
    )
    assert line.values.to_dict() == {2: 3.0, 3: 4.0}
    assert (line.lowest.to_dict(), line.highest.to_dict()) == ({2: 2.0, 3: 3.0}, {2: 4.0, 3: 5.0})
    assert draw([Line("empty", pd.Series(dtype=float))]) is None


def test_the_command_writes_beside_the_run_or_says_what_is_amiss(refusal, tmp_path):
    run = make_run(tmp_path)
    command = [sys.executable, "pipeline/report.py", str(run)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == f"report: {run}/report.html\n"
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    assert refusal(report, str(tmp_path / "none")).startswith("error: ")


@needs_chromium
def test_in_a_browser_the_page_fits_a_phone_and_the_boundary_moves(tmp_path):
    long = {"name": "long-" * 30, "data": {"url": "/data" * 30}}
    one = Run.load(str(whole_run(tmp_path, **long)))
    far = {"learning_rate": 0.000123, "final_learning_rate": 0.0000123, "clip": 0.123, "warmup_steps": 123}
    other = Run.load(str(whole_run(tmp_path, name="other", optimizer=far, network={"width": 0.25})))
    pages = [tmp_path / "one.html", tmp_path / "two.html"]
    write_report([one], str(pages[0]))
    write_report([one, other], str(pages[1]))
    asyncio.run(asyncio.wait_for(look_at(pages, tmp_path / "profile"), 60))


async def look_at(pages, profile):
    fits = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    async with browser(profile) as tell:
        await tell("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=False)
        for file in reversed(pages):
            await open_page(tell, file)
            assert await value(tell, fits)
            assert await value(tell, "document.images.length > 0")
            assert await value(tell, "[...document.images].every(image => image.complete && image.naturalWidth > 0)")

        views = "document.querySelector('.views')"
        await value(tell, f"{views}.scrollIntoView({{block: 'center'}})")
        x, y, width = await value(
            tell, f"(r => [r.x, r.y, r.width])({views}.querySelector('.left img').getBoundingClientRect())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            await tell("Input.dispatchMouseEvent", type=kind, x=x + width / 4, y=y + 20, button="left", clickCount=1)
        await until(tell, f"{views}.querySelector('input').value === '25'")
        clip = f"getComputedStyle({views}.querySelector('.left img')).clipPath"
        assert await value(tell, clip) == "inset(0px 75% 0px 0px)"
        for kind in ("keyDown", "keyUp"):
            await tell(
                "Input.dispatchKeyEvent", type=kind, key="ArrowRight", code="ArrowRight", windowsVirtualKeyCode=39
            )
        await until(tell, f"{clip} === 'inset(0px 74% 0px 0px)'")

        await value(tell, "document.querySelectorAll('details').forEach(each => { each.open = true; })")
        names = "[...document.querySelectorAll('.sortable tbody th')].slice(0, 3).map(cell => cell.textContent).join()"
        await value(tell, "document.querySelectorAll('.sortable th button')[1].click()")
        assert await value(tell, names) == "55,23,22"
        await value(tell, "document.querySelectorAll('.sortable th button')[1].click()")
        assert await value(tell, names) == "22,23,55"
        assert await value(tell, fits)

        await tell("Emulation.setScriptExecutionDisabled", value=True)
        await tell("Page.reload")
        await until(tell, "document.readyState === 'complete' && !document.documentElement.classList.contains('js')")
        places = f"[...{views}.querySelectorAll('img')].map(image => image.getBoundingClientRect())"
        assert await value(tell, f"new Set({places}.map(place => [place.x, place.y].join())).size") == 4


@needs_chromium
def test_in_a_browser_columns_of_words_and_of_numbers_sort(tmp_path):
    columns = {
        "words": ["image 10", "image 9", "Zebra", "apple"],
        "numbers": ["9", "-10.5", "1e-05", "10"],
        "special": ["nan", "0.1", "inf", "-7"],
        "mixed": ["3", "", "12", "late"],
    }
    orders = {
        "words": ["apple", "image 9", "image 10", "Zebra"],
        "numbers": ["-10.5", "1e-05", "9", "10"],
        "special": ["nan", "-7", "0.1", "inf"],
        "mixed": ["", "3", "12", "late"],
    }
    file = tmp_path / "page.html"
    table = Table([*columns], [*zip(*columns.values(), strict=True)], "sortable")
    file.write_text(render_page("sorting", [], {"table": [table]}))
    found = asyncio.run(asyncio.wait_for(sorted_columns(file, tmp_path / "profile"), 60))
    assert found == [each for order in orders.values() for each in (order, order[::-1])]


async def sorted_columns(file, profile):
    """Each column's texts after a click on its head, and after another one."""
    found = []
    async with browser(profile) as tell:
        await open_page(tell, file)
        heads = await value(tell, "document.querySelectorAll('th button').length")
        for index in sorted([*range(heads)] * 2):
            await value(tell, f"document.querySelectorAll('th button')[{index}].click()")
            rows = "[...document.querySelectorAll('tbody tr')]"
            found.append(await value(tell, f"{rows}.map(row => row.cells[{index}].textContent)"))
    return found


async def open_page(tell, file):
    await tell("Page.navigate", url=file.as_uri())
    await until(tell, f"location.href === '{file.as_uri()}' && document.readyState === 'complete'")


@asynccontextmanager
async def browser(profile):
    """A headless browser on an empty page; yields a function that gives it a command of the DevTools protocol."""
    quiet = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
    process = await asyncio.create_subprocess_exec(
        *(CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", *quiet),
        *(f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank"),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        while not (profile / "DevToolsActivePort").exists() or not (profile / "DevToolsActivePort").read_text():
            assert process.returncode is None, "the browser ended at once"
            await asyncio.sleep(0.05)
        port = (profile / "DevToolsActivePort").read_text().split()[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                (target,) = [each for each in await answer.json() if each["type"] == "page"]
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                yield lambda method, **parameters: command(socket, method, parameters)
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


async def command(socket, method, parameters):
    await socket.send_json({"id": 1, "method": method, "params": parameters})
    while True:
        answer = await socket.receive_json()
        if answer.get("id") == 1:
            assert "error" not in answer, answer
            return answer["result"]


async def value(tell, expression):
    result = await tell("Runtime.evaluate", expression=expression, returnByValue=True)
    assert "exceptionDetails" not in result, result
    return result["result"].get("value")


async def until(tell, expression):
    while not await value(tell, expression):
        await asyncio.sleep(0.05)
