"""Storage: whole or not at all, on local paths; S3 URLs are understood."""

from pathlib import Path

import pytest

from pipeline import storage


def test_write_replaces_whole_and_leaves_nothing_beside(tmp_path):
    url = str(tmp_path / "below/file")
    storage.write_text(url, "one")
    storage.write_text(url, "two")
    assert storage.read_text(url) == "two"
    assert storage.listdir(str(tmp_path / "below")) == ["file"]


def test_a_failed_write_keeps_what_was_there(tmp_path, monkeypatch):
    url = str(tmp_path / "file")
    storage.write_text(url, "one")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk gone")))
    with pytest.raises(OSError, match="disk gone"):
        storage.write_text(url, "two")
    assert storage.read_text(url) == "one"


def test_reads_a_range_and_refuses_a_short_one(tmp_path):
    url = str(tmp_path / "file")
    storage.write_bytes(url, b"0123456789")
    assert storage.read_bytes(url, 3, 4) == b"3456"
    with pytest.raises(ValueError, match="5 bytes from 8 were asked for, the file has 2"):
        storage.read_bytes(url, 8, 5)


def test_folder_replaces_one_of_the_same_name(tmp_path):
    local, url = tmp_path / "local", str(tmp_path / "run/checkpoint")
    for content in ("one", "two"):
        local.mkdir(exist_ok=True)
        (local / "state").write_text(content)
        Path(url).parent.mkdir(exist_ok=True)
        storage.upload_folder(local, url, last="state")
    assert storage.read_text(storage.join(url, "state")) == "two"
    assert storage.listdir(str(tmp_path / "run")) == ["checkpoint"]


def test_missing_things(tmp_path):
    assert not storage.exists(str(tmp_path / "no"))
    assert storage.listdir(str(tmp_path / "no")) == []
    storage.delete(str(tmp_path / "no"))
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(str(tmp_path / "no"))


def test_unwritable_place_is_refused_with_the_url(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"file/below: cannot be written to"):
        storage.check_writable(str(tmp_path / "file/below"))


def test_urls(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("a/b") == str(tmp_path / "a/b")
    assert storage.absolute(f"file://{tmp_path}/a") == str(tmp_path / "a")
    assert storage.absolute("s3://bucket/prefix/") == "s3://bucket/prefix"
    assert storage.join("s3://bucket/", "a", "b") == "s3://bucket/a/b"
    assert storage.name_of("s3://bucket/a/b/") == "b"
    with pytest.raises(ValueError, match="gs:// is not supported; use a local path or s3://"):
        storage.absolute("gs://bucket")
