"""Where on a node the cache lies: in the folder that was chosen, else on the first disk of the node's own."""

import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

MOUNTS = Path("/proc/self/mounts")
SHARED = {  # between machines: locks and mapped files are slow there or wrong, and quotas narrow
    "afs", "beegfs", "beegfs_nodev", "ceph", "cifs", "gfs2", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4",
    "ocfs2", "orangefs", "panfs", "pvfs2", "smb3", "smbfs", "wekafs",
}  # fmt: skip
LOCAL_FUSE = {"fuse.fuse-overlayfs", "fuse.mergerfs", "fuseblk"}  # of the others nobody knows
MEMORY = {"ramfs", "rootfs", "tmpfs"}


class Place(NamedTuple):
    """A folder for the cache, and what is to be said of the choice; nothing where that is empty."""

    folder: Path
    remark: str


def find_place(chosen: Path | None) -> Place:
    """The chosen folder, whatever it lies on, or by default ``~/.cache``, or a temporary folder, on a local disk.

    Raises:
        OSError: nothing serves; says why.
    """
    if chosen:
        folder = _expand(chosen)
        if not folder.is_absolute():
            raise OSError(f"{chosen}: this user has no home here")
        kind = file_system(folder)
        slow = f"on {kind}, where locks and mapped files can be slow or wrong; choose a local disk"
        return Place(folder, slow if _is_shared(kind) else "")
    faults: list[str] = []
    for folder, is_private in _candidates():
        fault = _fault(folder, is_private)
        if not fault:
            return Place(folder, "since " + "; ".join(faults) if faults else "")
        faults.append(fault)
    raise OSError(f"no local disk found ({'; '.join(faults)}); name a folder by data.cache")


def file_system(path: Path) -> str:
    """The type of the file system that holds a path, or would hold it; empty where that isn't known."""
    real = os.path.realpath(path)
    Path(real).exists()  # an automounter mounts what is asked for
    found, kind = "", ""
    for line in MOUNTS.read_text(errors="surrogateescape").splitlines() if MOUNTS.exists() else []:
        _, point, of, *_ = line.split(" ")
        point = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), point)
        if f"{real}/".startswith(f"{point.rstrip('/')}/") and len(point) >= len(found):  # a later mount hides others
            found, kind = point, of
    return kind


def _candidates() -> Iterator[tuple[Path, bool]]:
    """Folders in the order of preference, and whether others must be kept out of them."""
    yield Path(os.environ.get("XDG_CACHE_HOME") or _expand(Path("~/.cache"))), False
    named = (os.environ.get(name) for name in ("SLURM_TMPDIR", "TMPDIR"))
    for folder in dict.fromkeys([*filter(None, named), "/tmp", "/var/tmp"]):
        yield Path(folder, f"iaml-{os.getuid()}"), True


def _fault(folder: Path, is_private: bool) -> str:
    """Why the folder, which is made, does not serve; empty when it does."""
    if not folder.is_absolute():
        return f"{folder} is no absolute path"
    kind = file_system(folder)
    if _is_shared(kind) or kind in MEMORY:
        return f"{folder} lies on {kind}"
    try:
        folder.mkdir(0o700 if is_private else 0o777, parents=not is_private, exist_ok=True)
    except OSError as error:
        return f"{folder} cannot be made ({error.strerror})"
    found = folder.lstat()
    if is_private and not (stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077):
        return f"{folder} is not this user's alone"
    return "" if os.access(folder, os.W_OK | os.X_OK) else f"{folder} cannot be written to"


def _expand(path: Path) -> Path:
    with suppress(RuntimeError):  # nobody's home is known
        return path.expanduser()
    return path


def _is_shared(kind: str) -> bool:
    return kind in SHARED or (kind.startswith("fuse") and kind not in LOCAL_FUSE)
