"""Storage on S3: a real server that checks credentials, and a proxy before it that disturbs what passes."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import botocore.exceptions
import pytest
from s3 import Fault, FaultProxy, forget_clients

from pipeline import s3 as client
from pipeline import storage

SIZE = 3_000_000
MIDDLE = 1_700_000
DATA = random.Random(0).randbytes(SIZE)


@pytest.fixture(scope="module")
def bucket(s3_server):
    """The name of a bucket."""
    return storage.name_of(s3_server.make_bucket())


@pytest.fixture
def root(s3, bucket, tmp_path):
    """The URL of a place that only this test uses."""
    return f"s3://{bucket}/{tmp_path.name}"


@pytest.fixture
def url(root, bucket, s3):
    """An object that holds DATA."""
    s3.client.put_object(Bucket=bucket, Key=f"{storage.name_of(root)}/folder/object", Body=DATA)
    return f"{root}/folder/object"


@pytest.fixture
def disturbed(url, faults):
    """The object, read through the proxy."""
    return url


@pytest.fixture
def hasty(monkeypatch):
    """Short timeouts and pauses."""
    monkeypatch.setattr(client, "READ_TIMEOUT_S", 0.5)
    monkeypatch.setattr(client, "REPLY_TIMEOUT_S", 0.5)
    monkeypatch.setattr(client, "BRIEF_PATIENCE_S", 0.5)
    monkeypatch.setattr(client, "ATTEMPTS", 1)
    monkeypatch.setattr(client, "LONGEST_PAUSE_S", 0.1)
    forget_clients()


def read_through(url: str, size: int = SIZE, offset: int = 0, patience_s: float = 20) -> bytes:
    buffer = bytearray(size)
    storage.read_into(url, memoryview(buffer), offset, patience_s=patience_s)
    return bytes(buffer)


def first_bytes(faults: FaultProxy) -> list[int]:
    """The first byte that each reading request asked for."""
    ranges = [request.range for request in faults.requests if request.method == "GET"]
    return [int(re.findall(r"\d+", text)[0]) if text else 0 for text in ranges]


# --- what storage does, undisturbed


def test_objects_and_folders_behave_like_local_ones(root, tmp_path):
    for place in (root, str(tmp_path)):
        storage.write_text(f"{place}/run/settings.yaml", "a: 1")
        storage.write_text(f"{place}/run/deep/er/file", "x")
        storage.write_text(f"{place}/runner", "not in the folder run")
        assert storage.listdir(place) == ["run", "runner"]
        assert storage.listdir(f"{place}/run") == ["deep", "settings.yaml"]
        assert storage.listdir(f"{place}/run/") == ["deep", "settings.yaml"]
        assert storage.listdir(f"{place}/runner") == []
        assert storage.listdir(f"{place}/nowhere") == []
        assert storage.exists(f"{place}/run/settings.yaml")
        assert storage.exists(f"{place}/run/deep")
        assert not storage.exists(f"{place}/ru")
        storage.delete_folder(f"{place}/run")
        storage.delete_folder(f"{place}/run")
        # (this server lists an emptied folder for a while: S3 has none)
        assert not any(storage.exists(f"{place}/run/{name}") for name in ("settings.yaml", "deep/er/file"))
        assert storage.read_text(f"{place}/runner") == "not in the folder run"
        storage.delete(f"{place}/runner")
        assert not storage.exists(f"{place}/runner")


def test_reads_whole_and_in_ranges(url, root):
    assert storage.read_bytes(url) == DATA
    assert storage.read_bytes(url, 10, 100) == DATA[10:110]
    assert storage.read_bytes(url, 10, 0) == b""
    assert storage.read_bytes(url, SIZE - 5) == DATA[-5:]
    assert read_through(url) == DATA
    assert read_through(url, 1000, SIZE - 1000) == DATA[-1000:]
    storage.write_bytes(f"{root}/empty", b"")
    assert storage.read_bytes(f"{root}/empty") == b""


@pytest.mark.parametrize("scheme", ["s3", "local"])
def test_a_short_object_is_refused(scheme, root, tmp_path):
    url = f"{root}/short" if scheme == "s3" else str(tmp_path / "short")
    storage.write_bytes(url, b"0123456789")
    with pytest.raises(ValueError, match="short: 11 bytes from 0 were asked for, the file has 10 of them"):
        read_through(url, 11)
    with pytest.raises(ValueError, match="short: 5 bytes from 8 were asked for, the file has 2 of them"):
        storage.read_bytes(url, 8, 5)
    with pytest.raises(ValueError, match="short: 5 bytes from 20 were asked for, the file has 0 of them"):
        read_through(url, 5, 20)


def test_a_folder_goes_up_whole_and_its_last_file_last(root, tmp_path, faults):
    for name in ("weights", "state", "zeta"):
        (tmp_path / name).write_text(name)
    storage.upload_folder(tmp_path, f"{root}/checkpoint", last="state")
    assert storage.listdir(f"{root}/checkpoint") == ["state", "weights", "zeta"]
    written = [request.path.rsplit("/", 1)[-1] for request in faults.requests if request.method == "PUT"]
    assert written == ["weights", "zeta", "state"]


def test_only_what_is_named_is_deleted(root):
    """S3 knows no folders, only keys that begin alike."""
    strangers = ["run10/state", "run/notes", "run1.txt", "run1-copy/state"]
    for name in [*strangers, "run1/state", "run1/deep/er/state", "run"]:
        storage.write_text(f"{root}/{name}", name)
    storage.delete_folder(f"{root}/run1")
    storage.delete(f"{root}/run")  # an object, beside which lie others below its name
    storage.delete(f"{root}/run1-copy")  # not an object
    storage.delete_folder(f"{root}/run1.txt")  # not a folder
    for name in strangers:
        assert storage.read_text(f"{root}/{name}") == name
    for name in ("run1/state", "run1/deep/er/state", "run"):
        with pytest.raises(FileNotFoundError):
            storage.read_text(f"{root}/{name}")


@pytest.mark.parametrize("scheme", ["s3", "local"])
def test_a_strangers_files_in_a_folder_outlast_its_replacement(scheme, root, tmp_path):
    place = root if scheme == "s3" else str(tmp_path)
    strangers = ["notes.txt", "scores-mine.xlsx", "photographs/a.raw", "state.old"]
    for name in [*strangers, "state", "weights", "scores-dev.parquet"]:
        storage.write_text(f"{place}/checkpoint/{name}", f"old {name}")
    local = tmp_path / "made"
    local.mkdir()
    for name in ("weights", "state"):
        (local / name).write_text(f"new {name}")
    storage.upload_folder(local, f"{place}/checkpoint", last="state", stale=r"scores-dev\.parquet")
    assert [storage.read_text(f"{place}/checkpoint/{name}") for name in strangers] == [
        f"old {name}" for name in strangers
    ]
    assert [storage.read_text(f"{place}/checkpoint/{name}") for name in ("weights", "state")] == [
        "new weights",
        "new state",
    ]
    assert not storage.exists(f"{place}/checkpoint/scores-dev.parquet")


def test_a_folder_replaces_one_of_the_same_name(root, tmp_path, faults):
    storage.write_text(f"{root}/pictures-2/a", "a neighbour")
    for names in (["a", "b"], ["b", "c"]):
        local = tmp_path / "-".join(names)
        local.mkdir()
        for name in names:
            (local / name).write_text(f"{name} of {names}")
        storage.upload_folder(local, f"{root}/pictures", stale="[abc]")
    assert storage.listdir(f"{root}/pictures") == ["b", "c"]
    assert not storage.exists(f"{root}/pictures/a")
    assert storage.read_text(f"{root}/pictures/b") == "b of ['b', 'c']"
    assert storage.read_text(f"{root}/pictures-2/a") == "a neighbour"


def test_ray_s_file_system_reads_and_writes(root):
    filesystem, path = storage.arrow_filesystem(f"{root}/runs")
    with filesystem.open_output_stream(f"{path}/file") as file:
        file.write(b"written by pyarrow")
    assert storage.read_text(f"{root}/runs/file") == "written by pyarrow"


def test_the_region_comes_from_either_variable(s3, root, monkeypatch):
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    for environment in ({"AWS_REGION": "eu-west-3"}, {"AWS_DEFAULT_REGION": "eu-west-3"}):
        monkeypatch.delenv("AWS_REGION", raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        forget_clients()
        assert client.client_of(os.getpid()).meta.region_name == "eu-west-3"
        storage.write_text(f"{root}/file", "x")
        assert storage.read_text(f"{root}/file") == "x"


def test_a_profile_of_the_aws_files_serves(s3, root, monkeypatch, tmp_path):
    (tmp_path / "credentials").write_text(
        f"[research]\naws_access_key_id = {s3.key}\naws_secret_access_key = {s3.secret}\n"
    )
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "research")
    forget_clients()
    storage.write_text(f"{root}/file", "x")
    assert storage.read_text(f"{root}/file") == "x"


def test_threads_share_the_client(url):
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(read_through, [url] * 32)) == {DATA}


# --- uploads


@pytest.fixture
def small_parts(monkeypatch):
    """Parts as small as S3 allows."""
    monkeypatch.setattr(client, "PART", 5 << 20)


def test_a_large_file_goes_up_in_parts(s3, root, bucket, small_parts):
    data = DATA * 4
    storage.write_bytes(f"{root}/large", data)
    etag = s3.client.head_object(Bucket=bucket, Key=f"{storage.name_of(root)}/large")["ETag"]
    assert etag.strip('"').endswith("-3")  # 12 MB
    assert storage.read_bytes(f"{root}/large") == data


def test_an_upload_killed_midway_leaves_what_was_there(s3, root, faults, small_parts):
    large = f"{root}/large"
    storage.write_bytes(large, b"before")
    faults.add(Fault("stall", match=r"PUT .*partNumber=3", seconds=30))
    script = f"from pipeline import s3, storage; s3.PART = 5 << 20; storage.write_bytes({large!r}, bytes(12 << 20))"
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 20
    while not any(fault.hits for fault in faults.faults) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert faults.faults[0].hits == 1
    assert storage.read_bytes(large) == b"before"
    assert storage.listdir(root) == ["large"]


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", "PUT", times=3, status=500, code="InternalError"),
        Fault("status", "PUT", times=3),
        Fault("reset", "PUT", times=3),
        Fault("stall", "PUT", times=1, seconds=1.5),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.status}",
)
def test_writes_outlast_disturbances(fault, root, faults, hasty):
    faults.add(fault)
    storage.write_bytes(f"{root}/object", DATA)
    assert fault.hits == fault.times
    assert storage.read_bytes(f"{root}/object") == DATA


def test_a_part_that_fails_is_sent_again_alone(root, faults, small_parts):
    faults.add(Fault("status", "PUT .*partNumber=2", times=1, status=500, code="InternalError"))
    faults.add(Fault("reset", "PUT .*partNumber=3", times=1))
    storage.write_bytes(f"{root}/large", DATA * 4)
    sent = re.findall(r"partNumber=(\d)", " ".join(request.path for request in faults.requests))
    assert sorted(sent) == ["1", "2", "2", "3", "3"]
    assert storage.read_bytes(f"{root}/large") == DATA * 4


def test_a_failed_write_leaves_what_was_there(disturbed, faults, hasty):
    faults.add(Fault("status", "PUT", status=500, code="InternalError"))
    with pytest.raises(OSError, match=r"folder/object: S3 failed \(.*InternalError"):
        storage.write_bytes(disturbed, b"new", patience_s=0.3)
    assert storage.read_bytes(disturbed) == DATA


# --- reads through disturbances


@pytest.mark.parametrize(
    ("fault", "resumed_at"),
    [
        (Fault("status", times=3, status=503), 0),
        (Fault("status", times=3, status=500, code="InternalError"), 0),
        (Fault("status", times=3, status=429, code="TooManyRequests"), 0),
        (Fault("status", times=1, status=400, code="RequestTimeout"), 0),
        (Fault("reset", times=3), 0),
        (Fault("stall", times=1, seconds=1.5), 0),
        (Fault("reset", times=1, at=MIDDLE), 1),
        (Fault("truncate", times=1, at=MIDDLE), 1),
        (Fault("stall", times=1, at=MIDDLE, seconds=1.5), 1),
    ],
    ids=lambda value: f"{value.kind}-{value.at or value.status}" if isinstance(value, Fault) else "",
)
def test_reads_outlast_disturbances_and_ask_for_what_is_missing_alone(fault, resumed_at, disturbed, faults, hasty):
    faults.add(fault)
    assert read_through(disturbed) == DATA
    assert fault.hits == fault.times
    starts = first_bytes(faults)
    assert len(starts) == fault.hits + 1
    # of what had come, at most the chunk that was under way is asked for again
    assert (starts[-1] > MIDDLE - client.CHUNK) if resumed_at else (starts[-1] == 0)


def test_a_small_file_is_read_the_same_way(disturbed, faults, hasty):
    faults.add(Fault("truncate", times=2, at=MIDDLE))
    assert storage.read_bytes(disturbed) == DATA
    assert len(first_bytes(faults)) == 2 + (SIZE - MIDDLE > MIDDLE)


def test_many_disturbances_in_a_row(disturbed, faults, hasty):
    faults.reset(seed=2)
    kinds = [
        Fault("status", probability=0.2),
        Fault("reset", probability=0.2, at=600_000),
        Fault("truncate", probability=0.2, at=400_000),
        Fault("reset", probability=0.1),
    ]
    for fault in kinds:
        faults.add(fault)
    for _ in range(10):
        assert read_through(disturbed) == DATA
    assert all(fault.hits for fault in kinds)


def test_a_slow_body_is_no_failure(disturbed, faults, hasty):
    faults.add(Fault("rate", bytes_per_s=5e6))
    assert read_through(disturbed, patience_s=0.4) == DATA
    assert len(first_bytes(faults)) == 1


def test_an_object_replaced_meanwhile_is_read_anew(disturbed, faults, monkeypatch):
    other = DATA[::-1]
    fault = faults.add(Fault("reset", times=1, at=MIDDLE))
    attempt = client._Patience.wait

    def replace_then_wait(self, error):
        if fault.hits:
            storage.write_bytes(disturbed, other)
            monkeypatch.setattr(client._Patience, "wait", attempt)
        attempt(self, error)

    monkeypatch.setattr(client._Patience, "wait", replace_then_wait)
    assert read_through(disturbed) == other


def test_connections_are_used_again(url, s3):
    client.client_of(os.getpid())
    opened = []
    manager = client.client_of(os.getpid())._endpoint.http_session._manager
    for _ in range(5):
        read_through(url)
        opened = [manager.pools[key].num_connections for key in manager.pools.keys()]  # noqa: SIM118
    assert opened == [1]


# --- failures


def test_silence_beyond_patience_names_the_url_and_what_to_check(disturbed, faults, hasty):
    faults.add(Fault("stall", at=MIDDLE, seconds=1.5))
    with pytest.raises(TimeoutError, match=r"folder/object: S3 cannot be reached .* check AWS_ENDPOINT_URL"):
        read_through(disturbed, patience_s=0.2)


def test_errors_that_stay_are_raised_in_the_end(disturbed, faults, hasty):
    faults.add(Fault("status", status=503))
    with pytest.raises(OSError, match=r"folder/object: S3 failed \(.*SlowDown"):
        read_through(disturbed, patience_s=3.0)
    assert len(faults.requests) >= 2


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("{root}/nothing", FileNotFoundError, "nothing: nothing is there; check the path"),
        ("s3://no-such-bucket/file", FileNotFoundError, "no-such-bucket/file: there is no such bucket; check its name"),
    ],
)
def test_missing_things_are_not_asked_for_twice(path, error, message, root, faults):
    url = path.format(root=root)
    with pytest.raises(error, match=message):
        read_through(url, 10)
    with pytest.raises(error, match=message):
        storage.read_bytes(url)
    assert len(faults.requests) == 2


def operations(url):
    """All that storage does with a URL."""
    return {
        "read_into": lambda: read_through(url, 10, patience_s=client.BRIEF_PATIENCE_S),
        "read_bytes": lambda: storage.read_bytes(url, patience_s=client.BRIEF_PATIENCE_S),
        "exists": lambda: storage.exists(url),
        "listdir": lambda: storage.listdir(url),
        "write": lambda: storage.write_bytes(url, b"x", patience_s=client.BRIEF_PATIENCE_S),
        "delete": lambda: storage.delete(url),
        "delete_folder": lambda: storage.delete_folder(url),
    }


@pytest.mark.parametrize("variable", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
def test_wrong_credentials(variable, url, faults, monkeypatch):
    monkeypatch.setenv(variable, "wrong")
    forget_clients()
    for operation in operations(url).values():
        with pytest.raises(PermissionError, match=r"folder/object: S3 refuses access .*check AWS_PROFILE, or AWS_ACC"):
            operation()
    assert len(faults.requests) <= 8  # refusals are final
    with pytest.raises(ValueError, match=r"cannot be written to .*S3 refuses access"):
        storage.check_writable(url)


@pytest.mark.parametrize("profile", [None, "nobody"])
def test_no_credentials(profile, url, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    if profile:
        monkeypatch.setenv("AWS_PROFILE", profile)
    forget_clients()
    for operation in operations(url).values():
        with pytest.raises(PermissionError, match=r"folder/object: no S3 credentials .*set AWS_PROFILE, or AWS_ACCESS"):
            operation()


def test_an_unreachable_endpoint(url, hasty, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    forget_clients()
    for operation in operations(url).values():
        with pytest.raises(ConnectionError, match=r"folder/object: S3 cannot be reached .*check AWS_ENDPOINT_URL"):
            operation()
    with pytest.raises(ValueError, match=r"cannot be written to .*S3 cannot be reached"):
        storage.check_writable(url)


def test_a_missing_bucket_can_t_be_written_to(s3):
    with pytest.raises(ValueError, match=r"no-such-bucket/run: cannot be written to .*no such bucket"):
        storage.check_writable("s3://no-such-bucket/run")


def test_no_message_shows_a_secret(url, s3, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "unknown-key")
    forget_clients()
    with pytest.raises(PermissionError) as caught:
        storage.read_bytes(url)
    assert s3.secret not in str(caught.value)
    assert isinstance(caught.value.__cause__, botocore.exceptions.ClientError)


# --- the proxy itself


def test_a_flipped_bit_gets_through(disturbed, faults):
    """S3 over HTTP does not notice it: who needs to know compares checksums."""
    faults.add(Fault("flip", times=1, at=MIDDLE))
    got = read_through(disturbed)
    assert [i for i in range(SIZE) if got[i] != DATA[i]] == [MIDDLE]
    assert read_through(disturbed) == DATA
