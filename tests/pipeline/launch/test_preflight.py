"""What is checked before anything starts: data sets, held-out images, sizes, missing shards, and where they lie."""

from pathlib import Path

import pytest
from datasets import packed
from s3 import S3Server, forget_clients
from tables import config, data_set

from pipeline import storage
from pipeline.launch import preflight
from pipeline.run import record
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
    preflight.check_data(model.model_validate(settings | {"data": {"url": url} | parts.get("data", {})}))


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


def test_all_data_sets_are_loaded_the_first_one_first(tmp_path: Path) -> None:
    one = data_set(tmp_path / "one", train_0="1", dev_0="2")
    two = data_set(tmp_path / "two", train_0="3")
    assert [manifest.url for manifest in preflight.check_data(config(one, two))] == [one, two]
    with pytest.raises(ValueError, match=r"two: split 'dev' holds no pairs"):
        preflight.check_data(config(two, one))


def test_a_data_set_without_training_pairs_is_refused(tmp_path: Path) -> None:
    one = data_set(tmp_path / "one", train_0="1", dev_0="2")
    two = data_set(tmp_path / "two", test_0="3")
    with pytest.raises(ValueError, match=r"two: split 'train' holds no pairs"):
        preflight.check_data(config(one, two))


def test_held_out_images_among_the_training_ones_are_refused(tmp_path: Path) -> None:
    url = data_set(tmp_path, train_0="1", train_1="2", train_2="3", dev_0="4", dev_1="3", test_0="2", test_1="5")
    with pytest.raises(ValueError) as error:
        preflight.check_data(config(url))
    assert str(error.value) == (
        f"{url}: 2 held-out images are training images as well: dev-1 (dev) is train-2, test-0 (test) is train-1; "
        "pack again without them"
    )


@pytest.mark.parametrize("held_out_in_the_first", [True, False])
def test_held_out_images_may_be_training_images_of_no_data_set(held_out_in_the_first: bool, tmp_path: Path) -> None:
    held_out = data_set(tmp_path / "held-out", train_0="1", dev_0="2", test_5="6")
    trained = data_set(tmp_path / "trained", train_0="3", train_1="6", dev_0="5")
    urls = (held_out, trained) if held_out_in_the_first else (trained, held_out)
    with pytest.raises(ValueError, match=rf"^{held_out}: 1 .* images of {trained}: test-5 \(test\) is train-1;"):
        preflight.check_data(config(*urls))


def test_a_wrong_bucket_key_or_secret_is_a_plain_error(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = s3.make_bucket()
    for url, reason in (("s3://nothing-here/set", "no such bucket"), (f"{bucket}/set", "there is no manifest")):
        with pytest.raises(ValueError, match=rf"^{url}/manifest.parquet: .*{reason}"):
            preflight.check_data(config(url))
    with pytest.raises(ValueError, match=r"^s3://nothing-here/r: .*no such bucket"):
        record.check_run(config("/data", runs="s3://nothing-here"), {})
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    forget_clients()
    with pytest.raises(ValueError, match=rf"^{bucket}/set/manifest.parquet: cannot be read .*AWS_SECRET_ACCESS_KEY"):
        preflight.check_data(config(f"{bucket}/set"))
