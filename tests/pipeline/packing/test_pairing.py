"""Pairs are found in every published layout and matched by identifier."""

from pathlib import Path

import pytest

from pipeline.packing.pairing import find_pairs, match_pictures


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


LAYOUTS = {
    "LOL-v1": (
        ["our485/low/2.png", "our485/high/2.png", "eval15/low/1.png", "eval15/high/1.png"],
        ["test-1", "train-2"],
    ),
    "LOL-v1 mirror": (
        ["Train/input/2.png", "Train/target/2.png", "Test/input/1.png", "Test/target/1.png"],
        ["test-1", "train-2"],
    ),
    "LOL-v2 real": (
        [
            "Real_captured/Train/Low/low00001.png",
            "Real_captured/Train/Normal/normal00001.png",
            "Real_captured/Test/Low/low00690.png",
            "Real_captured/Test/Normal/normal00690.png",
        ],
        ["test-Real_captured-00690", "train-Real_captured-00001"],
    ),
    "LOL-v2 real, prefix dropped": (
        ["Train/Low/00001.png", "Train/Normal/00001.png", "Test/Low/00690.png", "Test/Normal/00690.png"],
        ["test-00690", "train-00001"],
    ),
    "LOL-v2 synthetic": (
        [
            "Synthetic/Train/Low/r000da54ft.png",
            "Synthetic/Train/Normal/r000da54ft.png",
            "Synthetic/Test/Low/r001.png",
            "Synthetic/Test/Normal/r001.png",
        ],
        ["test-Synthetic-r001", "train-Synthetic-r000da54ft"],
    ),
    "LSRW": (
        [
            "Training data/Huawei/low/123.jpg",
            "Training data/Huawei/high/123.jpg",
            "Training data/Nikon/low/123.jpg",
            "Training data/Nikon/high/123.jpg",
            "Eval/Nikon/low/7.JPG",
            "Eval/Nikon/high/7.JPG",
        ],
        ["test-Nikon-7", "train-Huawei-123", "train-Nikon-123"],
    ),
    "plain": (["low/a.png", "high/a.png"], ["train-a"]),
    "sides above splits": (
        ["low/train/a.png", "high/train/a.png", "low/test/b.png", "high/test/b.png"],
        ["test-b", "train-a"],
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_the_table(layout: str, tmp_path: Path) -> None:
    names, keys = LAYOUTS[layout]
    pairs = find_pairs(touch(tmp_path / "set", *names))
    assert [pair.key for pair in pairs] == keys
    assert all(pair.key.startswith(f"{pair.split}-") for pair in pairs)
    assert {str(path.relative_to(tmp_path / "set")) for pair in pairs for path in (pair.low, pair.high)} == set(names)


def test_matched_by_identifier_where_sorting_would_mix_them_up(tmp_path: Path) -> None:
    # Sorted, 2.png would meet 1.png, and low1.png normal2.jpg.
    pairs = find_pairs(touch(tmp_path / "set", "low/low1.png", "low/2.png", "normal/1.png", "normal/normal2.jpg"))
    assert [(pair.low.name, pair.high.name) for pair in pairs] == [
        ("low1.png", "1.png"),
        ("2.png", "normal2.jpg"),
    ]


def test_keys_hold_neither_dots_nor_slashes(tmp_path: Path) -> None:
    (pair,) = find_pairs(touch(tmp_path / "set", "a.b/low/x.y z.png", "a.b/high/x.y z.png"))
    assert pair.key == "train-a_b-x_y_z"


def test_the_source_folder_itself_may_be_a_split(tmp_path: Path) -> None:
    (pair,) = find_pairs(touch(tmp_path / "eval15", "low/1.png", "high/1.png"))
    assert (pair.key, pair.split) == ("test-1", "test")


def test_other_files_and_hidden_ones_are_left_out(tmp_path: Path) -> None:
    names = [
        "low/1.png",
        "high/1.png",
        "low/._1.png",
        "low/Thumbs.db",
        "low/.DS_Store",
        "high/.nfs0001",
        "preview.png",
        "README.md",
    ]
    assert len(find_pairs(touch(tmp_path / "set", *names))) == 1


@pytest.mark.parametrize(
    "folder", [".ipynb_checkpoints", ".thumbnails", "@eaDir", "__MACOSX", "$RECYCLE.BIN", "#recycle", "lost+found"]
)
def test_hidden_and_system_folders_are_left_out(folder: str, tmp_path: Path) -> None:
    copies = [f"{folder}/low/1.png", f"{folder}/high/1.png", f"low/{folder}/1.png", f"high/{folder}/1.png"]
    source = touch(tmp_path / folder / "set", "low/1.png", "high/1.png", *copies)
    assert [pair.key for pair in find_pairs(source)] == ["train-1"]
    assert match_pictures(source / "low", ["train-1"]) == {"train-1": source / "low/1.png"}


@pytest.mark.parametrize(("link", "to"), [("loop", "."), ("low/loop", "low"), ("low/loop", "."), ("high/a", "high/b")])
def test_a_link_into_its_own_folder_is_not_followed(link: str, to: str, tmp_path: Path) -> None:
    source = touch(tmp_path / "set", "low/1.png", "high/1.png")
    (source / "high/b").symlink_to(source / "high")
    (source / link).symlink_to(source / to)
    assert [pair.key for pair in find_pairs(source)] == ["train-1"]


def test_links_that_lead_elsewhere_are_followed_each_time(tmp_path: Path) -> None:
    touch(tmp_path / "shared", "1.png", "deeper/2.png")
    source = touch(tmp_path / "set", "a/low/1.png", "a/low/deeper/2.png", "b/low/1.png", "b/low/deeper/2.png")
    for scene in ("a", "b"):
        (source / scene / "high").symlink_to(tmp_path / "shared")
    assert [pair.key for pair in find_pairs(source)] == [
        "train-a-1",
        "train-a-deeper-2",
        "train-b-1",
        "train-b-deeper-2",
    ]


def test_links_that_lead_to_each_other_come_to_an_end(tmp_path: Path) -> None:
    source = touch(tmp_path / "set", "one/low/1.png", "two/high/1.png", "one/high/1.png", "two/low/1.png")
    (source / "one/over").symlink_to(source / "two")
    (source / "two/over").symlink_to(source / "one")
    assert [pair.key for pair in find_pairs(source)] == [
        "train-one-1", "train-one-over-1", "train-two-1", "train-two-over-1"
    ]  # fmt: skip


def test_images_without_a_partner_are_named(tmp_path: Path) -> None:
    source = touch(tmp_path / "set", "low/1.png", "high/1.png", "low/2.png", "high/3.png")
    with pytest.raises(ValueError, match=r"2 images have no partner:\n  low/2.png\n  high/3.png\nLayouts"):
        find_pairs(source)


def test_many_names_are_cut_short_with_their_count(tmp_path: Path) -> None:
    source = touch(tmp_path / "set", *[f"low/{number}.png" for number in range(25)])
    with pytest.raises(ValueError, match=r"25 images have no partner(.|\n)*and 5 more"):
        find_pairs(source)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.png", "b.png"], "no pairs of images found"),
        (["low/1.png", "low/1.jpg", "high/1.png"], r"low/1.jpg and .*low/1.png could both be image 1"),
        (["high/1.png", "normal/1.png", "low/1.png"], "could both be image 1"),
        (["val/low/1.png", "val/high/1.png"], "whether it is for training or for testing"),
        (["train/test/low/1.png", "train/test/high/1.png"], "whether it is for training or for testing"),
        (["low/a.b.png", "high/a.b.png", "low/a b.png", "high/a b.png"], "would get one key"),
    ],
)
def test_whatever_leaves_doubt_is_refused(names: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        find_pairs(touch(tmp_path / "set", *names))


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: there is no such folder"):
        find_pairs(tmp_path / "nowhere")


# --- pictures that some method made of the pairs


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["1.png", "22.jpg", "780.png"], {"test-1": "1.png", "test-22": "22.jpg", "train-780": "780.png"}),
        (["low00001.png", "low00690.png"], {"test-00690": "low00690.png", "test-00001": "low00001.png"}),
        (["normal00001.PNG"], {"test-00001": "normal00001.PNG"}),
        (
            ["Huawei/7.jpg", "Nikon/7.jpg", "Eval/Nikon/low/8.jpg"],
            {"test-Huawei-7": "Huawei/7.jpg", "test-Nikon-7": "Nikon/7.jpg", "test-Nikon-8": "Eval/Nikon/low/8.jpg"},
        ),
        (["test-Nikon-7.png", "Huawei-7.png"], {"test-Nikon-7": "test-Nikon-7.png", "test-Huawei-7": "Huawei-7.png"}),
        (["enhanced/epoch 9/22.png"], {"test-22": "enhanced/epoch 9/22.png"}),
        (["a.b c.png"], {"train-a_b_c": "a.b c.png"}),
        # with several data sets' pictures in one folder the whole key decides
        (["1.png", "test-1.png"], {"test-1": "test-1.png", "train-1": "1.png"}),
    ],
    ids=["LOL-v1", "LOL-v2", "LOL-v2 clean names", "LSRW", "keys", "folders between", "cleaned", "key before name"],
)
def test_pictures_are_matched_by_the_names_of_their_pairs(
    names: list[str], expected: dict[str, str], tmp_path: Path
) -> None:
    touch(tmp_path, *names, "not/of/the split 5.png", "notes.txt", "._1.png", ".DS_Store", ".nfs0001")
    assert match_pictures(tmp_path, expected) == {key: tmp_path / name for key, name in expected.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pictures_named_as_the_dark_images_of_any_layout_are_matched(layout: str, tmp_path: Path) -> None:
    names, _ = LAYOUTS[layout]
    pairs = find_pairs(touch(tmp_path / "set", *names))
    touch(tmp_path / "made", *[str(pair.low.relative_to(tmp_path / "set")) for pair in pairs])
    for split in ("train", "test"):
        wanted = {pair.key: pair.low.name for pair in pairs if pair.split == split}
        found = match_pictures(tmp_path / "made", wanted)
        assert {key: path.name for key, path in found.items()} == wanted


@pytest.mark.parametrize("names", [["1.png", "1.jpg"], ["1.png", "low1.png"], ["run a/1.png", "run b/1.png"]])
def test_two_pictures_of_one_pair_are_refused(names: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1\.\w+ and .*1\.\w+ could both be the picture of test-1; keep one"):
        match_pictures(touch(tmp_path, *names), ["test-1"])


def test_pairs_without_a_picture_are_named(tmp_path: Path) -> None:
    touch(tmp_path, "1.png", "Huawei/3.png")
    with pytest.raises(ValueError, match=r"2 images of the split have no picture here:\n  test-2\n  test-Nikon-3$"):
        match_pictures(tmp_path, ["test-1", "test-2", "test-Nikon-3", "test-Huawei-3"])
    with pytest.raises(ValueError, match="nowhere: 1 images of the split have no picture here"):
        match_pictures(tmp_path / "nowhere", ["test-1"])
