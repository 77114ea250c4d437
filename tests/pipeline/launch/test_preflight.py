"""What the data sets' tables tell of a run is said before its workers start."""

from pathlib import Path

import pytest
from datasets import packed

from pipeline import storage
from pipeline.launch import trainer
from pipeline.settings.config import Config
from tune.settings import SearchConfig


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of 9 training pairs and 3 for development."""
    return packed(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of images that are too small for AlexNet, and not for SSIM."""
    return packed(tmp_path_factory.mktemp("small"), size=(40, 30))


def check(url: str, model: type[Config] = Config, **parts: dict[str, object]) -> None:
    settings = {"run": {"name": "r"}, "train": {"steps": 4}} | parts
    trainer.check_data(model.model_validate(settings | {"data": {"url": url} | parts.get("data", {})}))


def test_fewer_pairs_than_a_batch_are_refused_where_epochs_end_with_a_whole_one(url: str) -> None:
    check(url, data={"drop_last": True}, train={"steps": 4, "global_batch": 9})
    with pytest.raises(
        ValueError, match=r"^9 training pairs do not fill one global batch of 10: set data.drop_last: false, or train"
    ):
        check(url, data={"drop_last": True}, train={"steps": 4, "global_batch": 10})


def test_a_share_that_no_block_of_samples_can_hold_is_refused(url: str, small: str) -> None:
    with pytest.raises(ValueError, match=r"^data.weights \(1, 0.0001\): a data set gets less than one sample in 1024"):
        check(url, data={"extra_urls": [small], "weights": (1, 1e-4)})


def test_images_too_small_for_the_score_that_ranks_are_refused_by_name(url: str, small: str, tmp_path: Path) -> None:
    check(url, checkpoint={"metric": "lpips"})
    check(small, checkpoint={"metric": "lpips"}, evaluation={"lpips": "vgg"})
    for model, ranking in (
        (Config, {"checkpoint": {"metric": "lpips"}}),
        (SearchConfig, {"search": {"objectives": ["psnr - lpips"], "reduction": None}}),
    ):
        with pytest.raises(
            ValueError, match=f"^{small}: LPIPS needs .* 31x31, 3 of the dev split are smaller, so that"
        ) as error:
            check(small, model, **ranking)
        assert str(error.value).count(": 40x30") == 3
    tiny = packed(tmp_path, size=(40, 10))
    with pytest.raises(ValueError, match=f"^{tiny}: SSIM needs images of at least 11x11, 3 of the dev split"):
        check(tiny, evaluation={"lpips": "none"})


def test_images_too_small_for_a_score_that_does_not_rank_are_named(
    small: str, capsys: pytest.CaptureFixture[str]
) -> None:
    check(small)
    shown = capsys.readouterr().out
    assert shown.startswith(f"no mean LPIPS: {small}: LPIPS needs images of at least 31x31, 3 of the dev split")
    assert "set evaluation.lpips: none" in shown
    check(small, evaluation={"lpips": "none"})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("shard", ["train-000001.tar", "dev-000000.tar"])
def test_missing_shards_are_named_unless_bad_data_are_skipped(
    shard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = packed(tmp_path)
    Path(url, shard).unlink()
    with pytest.raises(ValueError, match=rf"^{url}: 1 of \d shards of the \w+ split are missing; copy .*\n  {shard}$"):
        check(url)
    check(url, data={"on_bad_data": "skip"})

    def refuse(_: str) -> list[str]:
        raise PermissionError("listing is not allowed")

    monkeypatch.setattr(storage, "listdir", refuse)
    check(url)
