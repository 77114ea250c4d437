"""The one door to storage: local paths and ``s3://`` URLs behave alike.

Everything that the project reads or writes for the user passes through here as a URL: a local path,
``file://`` or ``s3://``. Credentials and endpoint of S3 come from the standard AWS variables and
files. Whatever is written appears whole under its name or not at all.
"""

import os
import shutil
import uuid
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import fsspec
import pyarrow.fs
from fsspec.core import url_to_fs
from pydantic import AfterValidator

LOCAL, S3 = "file", "s3"


def scheme(url: str) -> str:
    """``file`` or ``s3``; any other scheme is a ``ValueError``."""
    found = urlsplit(url).scheme if "://" in url else LOCAL
    if found not in (LOCAL, S3):
        raise ValueError(f"{url}: storage {found}:// is not supported; use a local path or s3://bucket/prefix")
    return found


def is_local(url: str) -> bool:
    """Whether the URL names a place on this machine's file system."""
    return scheme(url) == LOCAL


def absolute(url: str) -> str:
    """The URL in a form that means the same in every working directory and on every worker."""
    if not is_local(url):
        return url.rstrip("/")
    return str(Path(url.removeprefix("file://")).expanduser().absolute())


Url = Annotated[str, AfterValidator(absolute)]  # a setting that means the same on every machine


def join(url: str, *parts: str) -> str:
    """The URL of ``parts`` below ``url``."""
    return "/".join([url.rstrip("/"), *parts])


def name_of(url: str) -> str:
    """The last part of the URL."""
    return url.rstrip("/").rsplit("/", 1)[-1]


def _open(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    filesystem, path = url_to_fs(absolute(url), use_listings_cache=False)
    return filesystem, path


def arrow_filesystem(url: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The file system and path of ``url`` for libraries that speak pyarrow (Ray Train)."""
    filesystem, path = _open(url)
    if is_local(url):
        return pyarrow.fs.LocalFileSystem(), path
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem)), path


def exists(url: str) -> bool:
    """Whether a file or folder is there."""
    filesystem, path = _open(url)
    return bool(filesystem.exists(path))


def listdir(url: str) -> list[str]:
    """Names directly below ``url``, sorted; empty when nothing is there."""
    filesystem, path = _open(url)
    try:
        entries = filesystem.ls(path, detail=False)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(name_of(entry) for entry in entries)


def read_bytes(url: str, offset: int = 0, length: int | None = None) -> bytes:
    """The content of a file, or ``length`` bytes of it from ``offset``.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the file ends before ``offset + length``.
    """
    filesystem, path = _open(url)
    end = None if length is None else offset + length
    data = bytes(filesystem.cat_file(path, start=offset, end=end))
    if length is not None and len(data) != length:
        raise ValueError(f"{url}: {length} bytes from {offset} were asked for, the file has {len(data)} of them")
    return data


def write_bytes(url: str, data: bytes) -> None:
    """Write a file whole or not at all; folders above it are made."""
    if not is_local(url):
        filesystem, path = _open(url)
        filesystem.pipe_file(path, data)  # an object appears when its upload completes
        return
    target = Path(absolute(url))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(target)
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(target)


def write_text(url: str, text: str) -> None:
    """Write UTF-8 text whole or not at all."""
    write_bytes(url, text.encode())


def read_text(url: str) -> str:
    """The content of a UTF-8 text file."""
    return read_bytes(url).decode()


def upload_folder(local: Path, url: str, *, last: str) -> None:
    """Copy a folder of files whole or not at all, replacing one of the same name.

    On a local file system the folder is written beside its place and renamed. Object stores have no
    rename of folders, so the file named ``last`` is written last: a folder without it is incomplete.
    """
    names = sorted(path.name for path in local.iterdir())
    assert last in names, f"{last} is missing in {local}"
    target = Path(absolute(url)) if is_local(url) else None
    place = str(_temporary_name(target)) if target else url
    for name in [*(name for name in names if name != last), last]:
        write_bytes(join(place, name), (local / name).read_bytes())
    if target:
        shutil.rmtree(target, ignore_errors=True)
        Path(place).replace(target)


def delete(url: str) -> None:
    """Delete a file, or a folder with all that it holds; nothing there is fine."""
    filesystem, path = _open(url)
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


def check_writable(url: str) -> None:
    """Prove that ``url`` can be written to, by writing and deleting a small file.

    Raises:
        ValueError: it cannot, with the URL and the reason.
    """
    probe = join(url, f".probe-{uuid.uuid4().hex}")
    try:
        write_bytes(probe, b"")
        delete(probe)
    except OSError as error:
        raise ValueError(f"{url}: cannot be written to ({error}); check the path and its permissions") from error


def _temporary_name(target: Path) -> Path:
    return target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
