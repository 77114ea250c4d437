"""Scoring against numpy and scikit-image, from shards to means."""

import numpy as np
import pytest
import torch
from datasets import packed
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from iaml import AutoEncoder, NetworkSettings, TeacherStudent, enhance
from pipeline import checkpoint
from pipeline.data.manifest import load_manifest
from pipeline.data.pairs import read_pair
from pipeline.evaluation.scoring import Scorer, fit_gamma, load_lpips, summarise
from pipeline.evaluation.settings import EvaluationSettings

NETWORK = NetworkSettings(width=1 / 16)


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Records of a test split, the networks, and the rows that a scorer gives for them."""
    folder = tmp_path_factory.mktemp("scoring")
    manifest = load_manifest(packed(folder, test=3))
    torch.manual_seed(0)
    task = TeacherStudent(NETWORK)
    task.teacher_decoder.head.refine[2].bias.data.add_(0.2)
    from safetensors.torch import save_file

    save_file(task.student.state_dict(), folder / checkpoint.STUDENT)
    save_file({f"decoder.{k}": v for k, v in task.teacher_decoder.state_dict().items()}, folder / checkpoint.TEACHER)
    records = manifest.pairs("test")
    scorer = Scorer(manifest.url, records, NETWORK, EvaluationSettings(lpips="none"), gamma=0.5)
    networks = {"student": task.student.eval(), "averaged": task.averaged_student().eval()}
    return manifest, networks, scorer, scorer.score(str(folder))


def pixels(image):
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


@pytest.mark.parametrize("method", ["input", "gamma", "student", "averaged"])
def test_scores_equal_scikit_image(scored, method):
    manifest, networks, _, rows = scored
    for record in manifest.pairs("test"):
        low, clean = read_pair(manifest.url, record)
        x = torch.from_numpy(low.copy()).permute(2, 0, 1)[None] / 255
        outputs = {"input": lambda x=x: x, "gamma": lambda x=x: x**0.5}
        outputs |= {name: lambda x=x, net=net: enhance(net, x) for name, net in networks.items()}
        enhanced = pixels(outputs[method]()[0].permute(1, 2, 0).numpy())
        (row,) = [row for row in rows if row["key"] == record.key and row["method"] == method]
        assert row["psnr"] == pytest.approx(peak_signal_noise_ratio(clean, enhanced, data_range=255), abs=1e-4)
        ssim = structural_similarity(
            clean,
            enhanced,
            channel_axis=2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
        )
        assert row["ssim"] == pytest.approx(ssim, abs=1e-5)


def test_means_are_over_images(scored):
    rows = scored[3]
    means = summarise(rows)
    assert list(means) == ["input", "gamma", "student", "averaged"]
    assert means["student"]["psnr"] == pytest.approx(np.mean([r["psnr"] for r in rows if r["method"] == "student"]))


def test_gamma_is_fitted_on_luminance(scored):
    manifest = scored[0]
    gamma = fit_gamma(manifest)
    low, clean = np.array([(r.low_luminance, r.high_luminance) for r in manifest.pairs("train")]).T
    # the fixture darkens by 0.15, so the exponent that undoes it for grey of mean brightness is near this
    assert gamma == pytest.approx(np.log(clean.mean()) / np.log(low.mean()), rel=0.05)
    errors = [((np.log(clean) - exponent * np.log(low)) ** 2).sum() for exponent in (gamma - 0.01, gamma, gamma + 0.01)]
    assert errors[1] == min(errors)


def test_missing_lpips_weights_give_a_reason(tmp_path, monkeypatch):
    assert load_lpips(EvaluationSettings(lpips="none"), "cpu") == (None, {"missing": "turned off by evaluation.lpips"})
    with pytest.raises(ValueError, match="no-such-file"):
        load_lpips(EvaluationSettings(lpips_weights=str(tmp_path / "no-such-file.pth")), "cpu")


def test_pictures_show_low_gamma_enhanced_and_clean(scored, tmp_path):
    manifest, networks, scorer, _ = scored
    record = manifest.pairs("test")[0]
    folder = manifest.url.removesuffix("/shards")
    pictures = scorer.pictures(folder, [record.key, "another actor's"])
    low, clean = read_pair(manifest.url, record)
    assert list(pictures) == [record.key]
    assert np.array_equal(pictures[record.key][0], low)
    assert np.array_equal(pictures[record.key][3], clean)
    x = torch.from_numpy(low.copy()).permute(2, 0, 1)[None] / 255
    assert isinstance(networks["student"], AutoEncoder)
    assert np.array_equal(pictures[record.key][2], pixels(enhance(networks["student"], x)[0].permute(1, 2, 0).numpy()))
