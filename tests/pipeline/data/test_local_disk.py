"""Where the cache lies: a local disk is found where none is chosen, and what is chosen is taken."""

from pathlib import Path

import pytest

from pipeline.data import local_disk
from pipeline.data.local_disk import file_system, find_place


class Node:
    """A node of which the tests say what is mounted; all it has lies below ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home, self.job, self.temporary = (root / name for name in ("home", "job", "temporary"))
        self.table = root / "mounts"
        for folder in (self.home, self.job, self.temporary):
            folder.mkdir(parents=True)
        self.mount("ext4", Path("/"))

    def mount(self, kind: str, path: Path) -> None:
        point = str(path).replace(" ", "\\040")
        with self.table.open("a") as table:
            table.write(f"device {point} {kind} rw 0 0\n")


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    """A node whose home, temporary folder and job's folder lie on a local disk, until something is mounted."""
    node = Node(tmp_path / "a node")
    monkeypatch.setattr(local_disk, "MOUNTS", node.table)
    monkeypatch.setenv("HOME", str(node.home))
    monkeypatch.setenv("TMPDIR", str(node.temporary))
    for name in ("XDG_CACHE_HOME", "SLURM_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    return node


def test_the_cache_of_the_home_is_taken_where_it_lies_on_a_local_disk(node: Node) -> None:
    node.mount("nfs4", node.temporary)
    assert find_place(None) == (node.home / ".cache", "")
    assert (node.home / ".cache").is_dir()


def test_the_users_own_place_for_caches_comes_first(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(node.job / "caches"))
    assert find_place(None).folder == node.job / "caches"


@pytest.mark.parametrize("kind", ["nfs4", "lustre", "beegfs", "gpfs", "ceph", "cifs", "fuse.sshfs", "fuse", "tmpfs"])
def test_a_temporary_folder_of_the_user_alone_is_taken_where_the_home_is_not_on_a_local_disk(
    kind: str, node: Node
) -> None:
    node.mount(kind, node.home)
    folder, remark = find_place(None)
    assert folder.parent == node.temporary and folder.stat().st_mode & 0o777 == 0o700
    assert remark == f"since {node.home}/.cache lies on {kind}"
    assert find_place(None) == (folder, remark)
    assert not list(node.home.iterdir())


def test_the_jobs_own_folder_comes_before_the_nodes(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_TMPDIR", str(node.job))
    node.mount("nfs", node.home)
    assert find_place(None).folder.parent == node.job
    node.mount("tmpfs", node.job)  # which would take the job's memory
    assert find_place(None).folder.parent == node.temporary


def test_what_another_user_may_have_put_there_is_not_trusted(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_TMPDIR", str(node.job))
    node.mount("nfs", node.home)
    trap = find_place(None).folder
    trap.chmod(0o777)
    assert find_place(None).folder.parent == node.temporary and "not this user's alone" in find_place(None).remark
    trap.rmdir()
    trap.symlink_to(node.root)
    assert find_place(None).folder.parent == node.temporary
    trap.unlink()
    trap.write_text("a file in the way")
    assert find_place(None).folder.parent == node.temporary


def test_without_any_local_disk_it_says_what_it_saw(node: Node) -> None:
    node.mount("lustre", Path("/"))
    node.mount("nfs", node.home)
    with pytest.raises(
        OSError, match=r"no local disk found \(.*home/\.cache lies on nfs;.*/tmp/iaml-.* lies on lustre"
    ):
        find_place(None)
    assert not list(node.temporary.iterdir())


def test_a_user_without_a_home_gets_a_temporary_folder(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", unknown)
    assert find_place(None).folder.parent == node.temporary
    with pytest.raises(OSError, match="~/cache: this user has no home here"):
        find_place(Path("~/cache"))


def test_a_chosen_folder_is_taken_and_a_word_said_where_it_is_on_no_local_disk(node: Node) -> None:
    assert find_place(Path("~/kept")) == (node.home / "kept", "")
    node.mount("nfs4", node.home)
    folder, remark = find_place(Path("~/kept"))
    assert folder == node.home / "kept" and remark.startswith("on nfs4, where locks and mapped files can be slow")


def test_the_mount_that_counts_is_the_deepest_and_of_those_the_last(node: Node) -> None:
    home = str(node.home)
    assert file_system(node.home) == "ext4"
    node.mount("xfs", Path(home[:-1]))  # whose name the home's begins with
    assert file_system(node.home) == "ext4"
    node.mount("nfs4", node.home)
    node.mount("ext3", node.root)
    assert file_system(node.home) == file_system(node.home / "not/yet/there") == "nfs4"
    node.mount("btrfs", node.home)
    assert file_system(node.home) == "btrfs"
    (node.temporary / "link").symlink_to(node.home)
    assert file_system(node.temporary / "link/below") == "btrfs" and file_system(node.temporary) == "ext3"
    node.table.unlink()
    assert file_system(node.home) == ""
