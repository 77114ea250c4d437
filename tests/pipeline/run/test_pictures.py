"""Names of the pictures beside a checkpoint."""

import re

import pytest
from score_tables import make_run

from pipeline import storage
from pipeline.run import checkpoint, pictures, scores
from pipeline.run.history import Run


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_what_scoring_adds_goes_with_the_weights_and_a_users_files_stay(split):
    ours = [scores.scores_file(split), pictures.grid_file(split)]
    assert all(re.fullmatch(checkpoint.SCORED, name) for name in ours)
    names = [f"{key}.{view}.{pictures.PICTURE}" for key in ("eval15-1", "a.b") for view in pictures.VIEWS]
    assert all(re.fullmatch(pictures.PICTURES, name) for name in names)
    strangers = [
        "notes.txt",
        "scores.parquet",
        f"{ours[0]}.old",
        "grid-mine.png",
        "holiday.webp",
        "low.webp",
        ".DS_Store",
    ]
    assert not any(re.fullmatch(f"{checkpoint.SCORED}|{pictures.PICTURES}", name) for name in strangers)


def test_pictures_of_a_checkpoint_by_image_and_view(tmp_path):
    url = make_run(tmp_path, {1: 10.0})
    folder = f"{url}/checkpoint-00000001/pictures-dev"
    for name in ("train-7.low.webp", "train-7.error.webp", "train-a.b.clean.webp"):
        storage.write_text(f"{folder}/{name}", "")
    run = Run.load(url)
    assert run.pictures("checkpoint-00000001", "dev") == {
        "train-7": {"low": f"{folder}/train-7.low.webp", "error": f"{folder}/train-7.error.webp"},
        "train-a.b": {"clean": f"{folder}/train-a.b.clean.webp"},
    }
    assert run.pictures("checkpoint-00000001", "test") == {}
