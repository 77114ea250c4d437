"""The one door to storage: local paths and ``s3://`` URLs behave alike.

Everything that the project reads or writes for the user passes through here as a URL: a local path,
``file://`` or ``s3://``. Credentials, region and endpoint of S3 come from the standard AWS variables and
files. Whatever is written appears whole under its name or not at all. Failures are ``OSError``s.
"""

import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import pyarrow.fs
from pydantic import AfterValidator, BeforeValidator

from pipeline import s3

LOCAL, S3 = "file", "s3"
WHOLE = {LOCAL: "///", S3: "//[^/]"}  # what follows the colon


def scheme(url: str) -> str:
    """``file`` or ``s3``; ``ValueError`` for any other scheme, and for what is neither a path nor a whole URL."""
    found, rest = _parts(url)
    if found in WHOLE and not re.match(WHOLE[found], rest):
        raise ValueError(f"{url}: misspelt; write file:///path or s3://bucket/prefix")
    if found and found not in WHOLE and rest.startswith("//"):
        raise ValueError(f"{url}: storage {found}:// is not supported; use a local path or s3://bucket/prefix")
    if url in ("", "-"):
        raise ValueError(f"{url!r} is no place; give a local path or s3://bucket/prefix")
    return S3 if found == S3 else LOCAL


def is_local(url: str) -> bool:
    """Whether the URL names a place on this machine's file system."""
    return scheme(url) == LOCAL


def absolute(url: str) -> str:
    """The URL in a form that means the same in every working directory and on every worker."""
    found, rest = _parts(url)
    if not is_local(url):
        return f"s3:{rest}".rstrip("/")
    # unlike Path.expanduser, os's leaves a name as it is that begins with ~ and is no user's
    return str(Path(os.path.expanduser(rest[2:] if found == LOCAL else url)).absolute())  # noqa: PTH111


def _parts(url: str) -> tuple[str, str]:
    """The scheme in lower case, and what follows its colon; a path has none and follows whole."""
    found = re.match(r"([a-z][a-z0-9+.-]*):", url, re.IGNORECASE)
    return (found[1].lower(), url[found.end() :]) if found else ("", url)


def _local_path(given: Any) -> Any:
    if not isinstance(given, str | Path):
        return given  # which pydantic refuses
    if isinstance(given, str) and not is_local(given):
        raise ValueError(f"{given}: must be a local folder; copy it to one")
    return Path(absolute(str(given)))


Url = Annotated[str, AfterValidator(absolute)]  # a setting that means the same on every machine
LocalPath = Annotated[Path, BeforeValidator(_local_path)]  # one that is read or written on this machine alone


def join(url: str, *parts: str) -> str:
    """The URL of ``parts`` below ``url``."""
    return "/".join([url.rstrip("/"), *parts])


def name_of(url: str) -> str:
    """The last part of the URL."""
    return url.rstrip("/").rsplit("/", 1)[-1]


def arrow_filesystem(url: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The file system and path of ``url`` for libraries that speak pyarrow (Ray Train)."""
    if is_local(url):
        return pyarrow.fs.LocalFileSystem(), absolute(url)
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(s3.filesystem())), absolute(url).removeprefix("s3://")


def exists(url: str) -> bool:
    """Whether a file or folder is there."""
    return Path(absolute(url)).exists() if is_local(url) else s3.exists(absolute(url))


def listdir(url: str) -> list[str]:
    """Names directly below ``url``, sorted; empty when nothing is there."""
    try:
        if is_local(url):
            return sorted(path.name for path in Path(absolute(url)).iterdir())
        return s3.listdir(absolute(url))
    except (FileNotFoundError, NotADirectoryError):
        return []


def read_bytes(url: str, offset: int = 0, length: int | None = None, *, retry_s: float = s3.BRIEF_RETRY_S) -> bytes:
    """The content of a file, or ``length`` bytes of it from ``offset``.

    Requests to S3 are made again after transient errors, until no byte has come for ``retry_s`` seconds.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the file ends before ``offset + length``.
    """
    if not is_local(url):
        return s3.read(absolute(url), offset, length, retry_s)
    with Path(absolute(url)).open("rb") as file:
        file.seek(offset)
        data = file.read(length)
    if length is not None and len(data) != length:
        raise _too_short(url, length, offset, len(data))
    return data


def read_into(url: str, buffer: memoryview, offset: int = 0, *, retry_s: float = s3.RETRY_S) -> int:
    """Fill ``buffer`` with a file's bytes from ``offset`` on.

    A transfer from S3 that breaks off goes on at the byte where it did; it fails when no byte has come for
    ``retry_s`` seconds. If the file is replaced meanwhile, all bytes are those of the new one.

    Returns:
        How many requests to S3 had to be made again.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the file ends before the buffer is full.
    """
    if not is_local(url):
        return s3.read_into(absolute(url), buffer, offset, retry_s)
    with Path(absolute(url)).open("rb") as file:
        file.seek(offset)
        count = file.readinto(buffer)
    if count != buffer.nbytes:
        raise _too_short(url, buffer.nbytes, offset, count)
    return 0


def write_bytes(url: str, data: bytes, *, retry_s: float = s3.RETRY_S) -> None:
    """Write a file whole or not at all; folders above it are made.

    Requests to S3 are made again after transient errors, for ``retry_s`` seconds.
    """
    if not is_local(url):
        s3.write(absolute(url), data, retry_s)
        return
    target = Path(absolute(url))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(target)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError:  # a full disk must not keep half of it
        temporary.unlink(missing_ok=True)
        raise


def write_text(url: str, text: str) -> None:
    """Write UTF-8 text whole or not at all."""
    write_bytes(url, text.encode())


def read_text(url: str) -> str:
    """The content of a UTF-8 text file, without a byte order mark; ``ValueError`` when it is something else."""
    try:
        return read_bytes(url).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{url}: is not text in UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error


def read_version(url: str) -> tuple[bytes, str] | None:
    """The content of a small file, and the version that ``write_if`` compares; none where nothing is there."""
    try:
        if not is_local(url):
            data, tag = s3.read_tagged(absolute(url))
            return data, tag or ""
        data = read_bytes(url)
    except FileNotFoundError:
        return None
    return data, hashlib.sha256(data).hexdigest()


def write_if(url: str, data: bytes, version: str | None) -> str | None:
    """Write a small file if its version is still this one, or if there is none where that is none.

    A file is made by one of several processes that try at the same moment, on a disk as on S3. In replacing one, S3
    alone keeps them apart; on a disk, where looking and writing are two things, the last of them wins.

    Returns:
        The new version; none where another process was first.
    """
    if not is_local(url):
        return s3.write_if(absolute(url), data, version)
    if version is not None:
        found = read_version(url)
        if found is None or found[1] != version:
            return None
        write_bytes(url, data)
    elif not _create(Path(absolute(url)), data):
        return None
    return hashlib.sha256(data).hexdigest()


def upload_folder(local: Path, url: str, *, last: str | None = None, stale: str = "") -> None:
    """Copy a folder of files, whole or not at all; into one that is there, in the place of older files.

    A new folder on a local file system is written beside its place and renamed. Elsewhere the file named ``last`` is
    deleted first and written last: a folder without it is incomplete. What somebody else has put there stays.

    Args:
        local: the folder, without folders in it.
        url: what it becomes.
        last: name of a file.
        stale: regular expression for the names of older files that go though no new ones take their place.
    """
    names = sorted((path.name for path in local.iterdir()), key=lambda name: (name == last, name))
    assert last in (None, *names), f"{last} is missing in {local}"
    target = Path(absolute(url)) if is_local(url) and not exists(url) else None
    if target:
        _make_folder(target, {name: local / name for name in names})
        return
    old = [name for name in listdir(url) if name in names or re.fullmatch(stale, name)]
    for name in sorted(old, key=lambda name: (name != last, name)):
        delete(join(url, name))
    for name in names:
        write_bytes(join(url, name), (local / name).read_bytes())


def delete(url: str) -> None:
    """Delete a file; nothing there is fine. A folder of that name stays: on a local file system it is an error."""
    if is_local(url):
        Path(absolute(url)).unlink(missing_ok=True)
    else:
        s3.delete(absolute(url))


def delete_folder(url: str) -> None:
    """Delete a folder with all that it holds; nothing there is fine. Only for names that nobody else can have given."""
    with suppress(FileNotFoundError):
        if is_local(url):
            shutil.rmtree(absolute(url))
        else:
            s3.delete_folder(absolute(url))


def check_writable(url: str) -> None:
    """Prove that ``url`` can be written to, by writing and deleting a small file.

    Raises:
        ValueError: it cannot, with the URL and the reason.
    """
    probe = join(url, f".probe-{uuid.uuid4().hex}")
    try:
        write_bytes(probe, b"", retry_s=s3.BRIEF_RETRY_S)
        delete(probe)
    except OSError as error:
        raise ValueError(f"{url}: cannot be written to ({error}); check the path and its permissions") from error


def _make_folder(target: Path, files: Mapping[str, Path]) -> None:
    place = _temporary_name(target)
    place.mkdir(parents=True)
    try:
        for name, file in files.items():
            write_bytes(str(place / name), file.read_bytes())
        place.replace(target)
    except OSError:
        shutil.rmtree(place, ignore_errors=True)
        raise


def _create(target: Path, data: bytes) -> bool:
    """Write a file whole unless there is one; a link is made or refused in one step, on NFS as well."""
    temporary = _temporary_name(target)
    write_bytes(str(temporary), data)
    try:
        target.hardlink_to(temporary)
    except FileExistsError:
        return False
    except OSError:  # a file system without links, as FAT and many of FUSE: a reader may meet half a file
        return _create_in_place(target, data)
    finally:
        temporary.unlink()
    return True


def _create_in_place(target: Path, data: bytes) -> bool:
    try:
        with target.open("xb") as file:
            file.write(data)
    except FileExistsError:
        return False
    return True


def _temporary_name(target: Path) -> Path:
    return target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")


def _too_short(url: str, wanted: int, offset: int, present: int) -> ValueError:
    return ValueError(f"{url}: {wanted} bytes from {offset} were asked for, the file has {present} of them")
