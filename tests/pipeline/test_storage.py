"""Storage: whole or not at all, on local paths; S3 URLs are understood."""

import os
import shutil
from pathlib import Path

import pytest
from pydantic import ValidationError

from iaml import Settings
from pipeline import storage


def test_write_replaces_whole_and_leaves_nothing_beside(tmp_path):
    url = str(tmp_path / "below/file")
    storage.write_text(url, "one")
    storage.write_text(url, "two")
    assert storage.read_text(url) == "two"
    assert storage.listdir(str(tmp_path / "below")) == ["file"]


def test_a_file_is_made_once_where_there_are_no_links_either(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    url = str(tmp_path / "file")
    assert storage.write_if(url, b"one", None) and storage.write_if(url, b"two", None) is None
    assert storage.read_bytes(url) == b"one" and storage.listdir(str(tmp_path)) == ["file"]


@pytest.mark.parametrize("failing", [(Path, "replace"), (os, "fsync")], ids=["rename", "flush"])
def test_a_failed_write_keeps_what_was_there_and_leaves_nothing_beside(failing, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk gone")

    url = str(tmp_path / "file")
    storage.write_text(url, "one")
    monkeypatch.setattr(*failing, fail)
    with pytest.raises(OSError, match="disk gone"):
        storage.write_text(url, "two")
    assert storage.read_text(url) == "one"
    assert storage.listdir(str(tmp_path)) == ["file"]


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


def test_no_file_of_a_replaced_folder_stays_though_the_new_one_be_empty(tmp_path):
    local, url = tmp_path / "local", str(tmp_path / "run/pictures")
    for names in (["a", "b"], ["b", "c"], []):
        shutil.rmtree(local, ignore_errors=True)
        local.mkdir()
        for name in names:
            (local / name).write_text(name)
        storage.upload_folder(local, url, stale="[abc]")
        assert storage.listdir(url) == names
    assert storage.listdir(str(tmp_path / "run")) == ["pictures"]


def test_a_folder_that_cannot_be_written_whole_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk gone")

    (tmp_path / "local").mkdir()
    (tmp_path / "local/state").write_text("one")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk gone"):
        storage.upload_folder(tmp_path / "local", str(tmp_path / "run/checkpoint"), last="state")
    assert storage.listdir(str(tmp_path / "run")) == []


def test_a_folder_that_is_written_anew_is_incomplete_until_its_last_file_is_there(tmp_path, monkeypatch):
    local, url = tmp_path / "local", str(tmp_path / "run/checkpoint")
    local.mkdir()
    for name in ("a", "state"):
        (local / name).write_text(name)
    storage.upload_folder(local, url, last="state")
    written = []
    write = storage.write_bytes
    monkeypatch.setattr(
        storage, "write_bytes", lambda url, data: (written.append(storage.exists(f"{url}/../state")), write(url, data))
    )
    storage.upload_folder(local, url, last="state")
    assert written == [False, False] and storage.listdir(url) == ["a", "state"]


def test_a_folder_is_not_deleted_where_a_file_was_meant(tmp_path):
    storage.write_text(str(tmp_path / "stopped.txt/notes"), "a user's")
    with pytest.raises(OSError, match=r"stopped\.txt"):
        storage.delete(str(tmp_path / "stopped.txt"))
    assert storage.read_text(str(tmp_path / "stopped.txt/notes")) == "a user's"


def test_a_link_to_a_folder_is_not_followed_when_one_is_deleted(tmp_path):
    storage.write_text(str(tmp_path / "photographs/a.raw"), "a user's")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/photographs").symlink_to(tmp_path / "photographs")
    storage.delete_folder(str(tmp_path / "run"))
    assert storage.listdir(str(tmp_path)) == ["photographs"]
    assert storage.read_text(str(tmp_path / "photographs/a.raw")) == "a user's"


def test_missing_things(tmp_path):
    assert not storage.exists(str(tmp_path / "no"))
    assert storage.listdir(str(tmp_path / "no")) == []
    storage.delete(str(tmp_path / "no"))
    storage.delete_folder(str(tmp_path / "no"))
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


@pytest.mark.parametrize(
    "url", ["s3:/b/x", "s3:b/x", "S3:/b", "s3:///x", "s3://", "file:/x", "file:x", "file://host/x"]
)
def test_a_misspelt_url_is_no_path(url):
    with pytest.raises(ValueError, match=f"^{url}: misspelt; write file:///path or s3://bucket/prefix"):
        storage.absolute(url)


@pytest.mark.parametrize("url", ["", "-"])
def test_nothing_and_standard_output_are_no_places(url):
    with pytest.raises(ValueError, match=f"^'{url}' is no place"):
        storage.absolute(url)


def test_a_scheme_may_be_written_in_capitals(tmp_path):
    assert storage.absolute("S3://Bucket/Prefix") == "s3://Bucket/Prefix" and not storage.is_local("S3://Bucket/Prefix")
    assert storage.absolute(f"FILE://{tmp_path}/A") == f"{tmp_path}/A"


def test_a_tilde_is_the_home_folder_and_only_where_a_user_has_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    given = {"~": "/home/me", "~/a": "/home/me/a", "~nobody-of-this-name": f"{tmp_path}/~nobody-of-this-name"}
    assert {url: storage.absolute(url) for url in given} == given
    assert storage.absolute(f"{tmp_path}/~/a") == f"{tmp_path}/~/a"


@pytest.mark.parametrize("path", ["a:b", "C:/x", "12:30", "a/b://c", "my set # 1", "%41", "?a", " a "])
def test_a_local_path_may_look_odd(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    storage.write_text(path, "content")
    assert (tmp_path / path).read_text() == "content"


def test_local_paths_are_no_buckets(monkeypatch):
    class Places(Settings):
        source: storage.LocalPath

    monkeypatch.setenv("HOME", "/home/me")
    assert Places(source="~/a").source == Places(source=Path("~/a")).source == Path("/home/me/a")
    with pytest.raises(ValidationError, match="s3://bucket/a: must be a local folder; copy it to one"):
        Places(source="s3://bucket/a")
    with pytest.raises(ValidationError, match=r"source\n.*not a valid path"):
        Places(source=5)


def test_text_that_is_not_utf_8_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_bytes("ä".encode("utf-16"))
    with pytest.raises(ValueError, match=rf"^{tmp_path}/file: is not text in UTF-8"):
        storage.read_text(str(tmp_path / "file"))
