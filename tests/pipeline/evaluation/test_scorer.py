"""Scoring against numpy and scikit-image, from shards to means."""

from itertools import product

import numpy as np
import pytest
import ray
import torch
from datasets import packed
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from iaml import AutoEncoder, NetworkSettings, TeacherStudent, enhance
from pipeline.data.manifest import load_manifest
from pipeline.data.pairs import read_pair
from pipeline.evaluation.failures import MachineError
from pipeline.evaluation.scorer import Scorer, Shared, find_lpips, fit_gamma
from pipeline.run import scores
from pipeline.run.pictures import VIEWS
from pipeline.settings.evaluation import EvaluationSettings

NETWORK = NetworkSettings(width=1 / 16)
SETTINGS = EvaluationSettings(lpips="none", protocols=("rgb_u8", "cidnet"))
pytestmark = pytest.mark.usefixtures("driver")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return load_manifest(packed(tmp_path_factory.mktemp("scoring"), test=3))


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    task = TeacherStudent(NETWORK)
    task.teacher_decoder.head.refine[2].bias.data.add_(0.2)
    return {"student": task.student.eval(), "averaged": task.averaged_student().eval()}


@pytest.fixture(scope="module")
def shared(driver, networks):
    return Shared(ray.put("no weights here"), ray.put(networks))


@pytest.fixture(scope="module")
def scorer(manifest):
    return Scorer(manifest.url, "test", 0, 2, SETTINGS, gamma=0.5)


@pytest.fixture(scope="module")
def table(manifest, scorer, shared):
    """The rows of all images of the test split, of which the scorer's own share is only a part."""
    return scores.to_table([row for record in manifest.pairs("test") for row in scorer.score(record.key, shared)])


def pixels(image):
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


@pytest.mark.parametrize("method", ["input", "gamma", "student", "averaged"])
def test_scores_equal_scikit_image(manifest, networks, table, method):
    for record in manifest.pairs("test"):
        low, clean = read_pair(manifest.url, record)
        x = torch.from_numpy(low.copy()).permute(2, 0, 1)[None] / 255
        outputs = {"input": lambda x=x: x, "gamma": lambda x=x: x**0.5}
        outputs |= {name: lambda x=x, net=net: enhance(net, x, precision="float32") for name, net in networks.items()}
        enhanced = pixels(outputs[method]()[0].permute(1, 2, 0).numpy())
        rows = table[(table["key"] == record.key) & (table["method"] == method) & (table["protocol"] == "rgb_u8")]
        values = rows.set_index("metric")["value"]
        assert values["psnr"] == pytest.approx(peak_signal_noise_ratio(clean, enhanced, data_range=255), abs=1e-4)
        ssim = structural_similarity(
            clean,
            enhanced,
            channel_axis=2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
        )
        assert values["ssim"] == pytest.approx(ssim, abs=1e-5)


def test_every_number_says_what_it_is(table):
    columns = ["method", "protocol", "metric"]
    kinds = {tuple(kind) for kind in table[columns].to_numpy()}
    assert kinds == set(product(["input", "gamma", "student", "averaged"], ["rgb_u8", "cidnet"], ["psnr", "ssim"]))
    assert table["libraries"].str.contains("torch .*lpips .*numpy .*pillow").all()
    assert table["reason"].isna().all() and table["lpips_sha256"].isna().all()
    assert set(table["device"]) == {"cpu"} and set(table["precision"]) == {"float32"}


def test_where_scores_are_computed_tf32_is_off(manifest):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # the latter is torch's default
    Scorer(manifest.url, "test", 0, 1, SETTINGS, gamma=0.5)
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    assert "tf32" not in (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision)


def test_lpips_bears_its_weights_checksum_or_the_reason_why_it_is_missing(manifest, shared):
    key = manifest.pairs("test")[0].key
    scorer = Scorer(manifest.url, "test", 0, 1, SETTINGS.model_copy(update={"lpips": "alex"}), gamma=0.5)
    missing = scores.to_table(scorer.score(key, shared)).query("metric == 'lpips'")
    assert (missing["reason"] == "no weights here").all() and missing["lpips_sha256"].isna().all()
    weights = find_lpips(EvaluationSettings())
    if isinstance(weights, str):
        pytest.skip(weights)
    found = scores.to_table(scorer.score_picture(key, np.zeros((48, 72, 3), np.uint8), Shared(ray.put(weights))))
    rows = found.query("metric == 'lpips' and method == 'images'")
    assert list(rows["lpips_sha256"]) == [weights.sha256] and list(rows["protocol"]) == ["alex"]
    assert (rows["value"] > 0.1).all() and (found.query("metric != 'lpips'")["lpips_sha256"].isna()).all()


def test_an_image_too_small_for_a_metric_is_scored_by_the_others(tmp_path):
    manifest = load_manifest(packed(tmp_path, test=1, size=(72, 24)))
    weights = find_lpips(EvaluationSettings())
    if isinstance(weights, str):
        pytest.skip(weights)
    scorer = Scorer(manifest.url, "test", 0, 1, EvaluationSettings(), gamma=0.5)
    (record,) = manifest.pairs("test")
    rows = scores.to_table(scorer.score_picture(record.key, np.zeros((24, 72, 3), np.uint8), Shared(ray.put(weights))))
    assert rows[rows["metric"] != "lpips"]["value"].notna().all()
    assert rows[rows["metric"] == "lpips"]["reason"].str.contains("at least 31x31, not 24x72").all()


def test_large_images_are_enhanced_in_tiles(tmp_path, shared, monkeypatch):
    manifest = load_manifest(packed(tmp_path, test=1, size=(300, 64)))
    seen = []
    monkeypatch.setattr(AutoEncoder, "forward", lambda self, image: seen.append(tuple(image.shape[-2:])) or image)
    scorer = Scorer(manifest.url, "test", 0, 1, SETTINGS.model_copy(update={"tile": 256}), gamma=0.5)
    (record,) = manifest.pairs("test")
    rows = scores.to_table(scorer.score(record.key, shared))
    assert len(seen) == 4 and max(seen) == (64, 256)
    psnr = rows.query("metric == 'psnr' and protocol == 'rgb_u8'").set_index("method")["value"]
    assert psnr["student"] == pytest.approx(psnr["input"], abs=1e-3)  # tiles that change nothing leave no seams


def failing(network, error, times):
    """The network, whose first calls fail."""
    count = iter(range(times))

    class Failing(torch.nn.Module):
        def forward(self, image):
            if next(count, None) is not None:
                raise error
            return network(image)

    return Failing()


@pytest.fixture
def scorer_of(manifest, networks):
    """A scorer and what all images have in common, where the student fails."""

    def make(error, times):
        scorer = Scorer(manifest.url, "test", 0, 1, SETTINGS, gamma=0.5)
        scorer._load = lambda shared: None  # the network stays in this process, and counts
        scorer._networks = networks | {"student": failing(networks["student"], error, times)}
        return scorer

    return make


def test_out_of_memory_is_tried_once_more_after_the_cache_is_emptied(manifest, table, shared, scorer_of, monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    key = manifest.pairs("test")[0].key
    rows = scores.to_table(scorer_of(torch.OutOfMemoryError("CUDA out of memory"), 1).score(key, shared))
    assert rows.equals(table[table["key"] == key].reset_index(drop=True)) and len(emptied) == 1


@pytest.mark.parametrize(
    ("error", "tries"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), 2),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700), 1),
        (RuntimeError("CUDA error: unspecified launch failure"), 1),
    ],
    ids=str,
)
def test_what_fails_for_the_machine_is_no_score_and_ends_the_process(
    manifest, shared, scorer_of, monkeypatch, error, tries
):
    ended = []
    monkeypatch.setattr("os._exit", ended.append)
    key = manifest.pairs("test")[0].key
    scorer = scorer_of(error, tries)
    scorer.ready()
    with pytest.raises(MachineError, match="CUDA"):
        scorer.score(key, shared)
    assert not ended  # before the error has been told
    scorer.ready()
    assert ended == [1]
    with pytest.raises(MachineError, match="CUDA"):
        scorer_of(error, tries).views(key, shared)


def test_what_fails_for_the_image_is_a_row_with_the_reason(manifest, shared, scorer_of, monkeypatch):
    monkeypatch.setattr("os._exit", lambda status: pytest.fail("ended"))
    scorer = scorer_of(RuntimeError("Sizes of tensors must match"), 1)
    rows = scores.to_table(scorer.score(manifest.pairs("test")[0].key, shared))
    assert set(rows[rows["method"] == "student"]["reason"]) == {"Sizes of tensors must match"}
    assert rows[rows["method"] != "student"]["reason"].isna().all()
    scorer.ready()


def test_gamma_is_fitted_on_luminance(manifest):
    gamma = fit_gamma(manifest)
    low, clean = np.array([(r.low_luminance, r.high_luminance) for r in manifest.pairs("train")]).T
    # the fixture darkens by 0.15, so the exponent that undoes it for grey of mean brightness is near this
    assert gamma == pytest.approx(np.log(clean.mean()) / np.log(low.mean()), rel=0.05)
    errors = [((np.log(clean) - exponent * np.log(low)) ** 2).sum() for exponent in (gamma - 0.01, gamma, gamma + 0.01)]
    assert errors[1] == min(errors)


def test_missing_lpips_weights_give_a_reason(tmp_path):
    assert find_lpips(EvaluationSettings(lpips="none")) == "turned off by evaluation.lpips"
    with pytest.raises(ValueError, match="no-such-file"):
        find_lpips(EvaluationSettings(lpips_weights=str(tmp_path / "no-such-file.pth")))


def test_views_show_low_gamma_enhanced_clean_and_the_error(manifest, networks, scorer, shared):
    record = manifest.pairs("test")[0]
    views = scorer.views(record.key, shared)
    low, clean = read_pair(manifest.url, record)
    assert list(views) == list(VIEWS)
    assert np.array_equal(views["low"], low)
    assert np.array_equal(views["clean"], clean)
    x = torch.from_numpy(low.copy()).permute(2, 0, 1)[None] / 255
    enhanced = enhance(networks["student"], x, precision="float32")[0].permute(1, 2, 0).numpy()
    assert np.array_equal(views["enhanced"], pixels(enhanced))
    error = np.abs(enhanced - clean / 255).mean(axis=2)
    brightness = views["error"].sum(axis=2, dtype=int)
    assert brightness.flat[error.argmin()] < brightness.flat[error.argmax()]
