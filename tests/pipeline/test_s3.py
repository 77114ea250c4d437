"""Storage on S3: a real server that checks credentials, and a proxy before it that breaks what passes."""

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
def proxied(url, faults):
    """The object, read through the proxy."""
    return url


@pytest.fixture
def hasty(monkeypatch):
    """Short timeouts and pauses."""
    monkeypatch.setattr(client, "READ_TIMEOUT_S", 0.5)
    monkeypatch.setattr(client, "REPLY_TIMEOUT_S", 0.5)
    monkeypatch.setattr(client, "BRIEF_RETRY_S", 0.5)
    monkeypatch.setattr(client, "LONGEST_PAUSE_S", 0.1)
    forget_clients()


def read_through(url: str, size: int = SIZE, offset: int = 0, retry_s: float = 20) -> bytes:
    buffer = bytearray(size)
    storage.read_into(url, memoryview(buffer), offset, retry_s=retry_s)
    return bytes(buffer)


def first_bytes(faults: FaultProxy) -> list[int]:
    """The first byte that each reading request asked for."""
    ranges = [request.range for request in faults.requests if request.method == "GET"]
    return [int(re.findall(r"\d+", text)[0]) if text else 0 for text in ranges]


# --- what storage does, without errors


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


@pytest.fixture
def small_pages(monkeypatch):
    """Listings that come three keys at a time."""
    monkeypatch.setattr(client, "PAGE", 3)


def keys_below(s3, url):
    """All keys below the URL, without it."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    listing = s3.client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/")
    return [entry["Key"].removeprefix(f"{prefix}/") for entry in listing.get("Contents", [])]


def test_folders_of_many_pages_are_listed_and_deleted_whole(s3, root, faults, small_pages):
    files, folders = [f"file-{number}" for number in range(8)], [f"folder-{number}" for number in range(5)]
    names = [f"run/{name}" for name in (*files, *(f"{folder}/{file}" for folder in folders for file in "ab"))]
    for name in [*names, "run", "run-2/a", "run.txt"]:
        storage.write_text(f"{root}/{name}", name)
    faults.add(Fault("status", "GET .*continuation-token", times=1))  # one page, which is asked for again alone
    assert storage.listdir(f"{root}/run") == sorted(files + folders)
    pages = [request.path for request in faults.requests if "list-type=2" in request.path]
    assert len(pages) == len(set(pages)) + 1 >= (8 + 5) / 3
    storage.delete_folder(f"{root}/run")
    assert keys_below(s3, root) == ["run", "run-2/a", "run.txt"]


def test_an_object_that_stands_for_a_folder_is_not_in_it_and_goes_with_it(s3, root, bucket):
    """Consoles make such objects, whose names end with a slash."""
    s3.client.put_object(Bucket=bucket, Key=f"{storage.name_of(root)}/made/", Body=b"")
    assert storage.exists(f"{root}/made")
    assert storage.listdir(f"{root}/made") == []
    storage.write_text(f"{root}/made/a", "a")
    assert storage.listdir(f"{root}/made") == ["a"]
    storage.delete_folder(f"{root}/made")
    assert keys_below(s3, root) == []


def test_an_object_that_can_t_be_deleted_is_named(s3, root, faults):
    for name in "abc":
        storage.write_text(f"{root}/run/{name}", name)
    faults.add(Fault("status", "DELETE .*/run/b", status=403, code="AccessDenied"))
    with pytest.raises(PermissionError, match=r"/run/b: S3 refuses access .*AccessDenied"):
        storage.delete_folder(f"{root}/run")
    assert keys_below(s3, f"{root}/run") == ["b"]


def test_a_server_that_misses_what_is_to_be_deleted(root, faults):
    faults.add(Fault("status", "DELETE", status=404, code="NoSuchKey"))
    storage.delete(f"{root}/nothing")
    storage.write_text(f"{root}/run/file", "deleted meanwhile")
    storage.delete_folder(f"{root}/run")
    assert [fault.hits for fault in faults.faults] == [2]


def test_nothing_is_in_a_bucket_that_is_missing(s3):
    assert not storage.exists("s3://no-such-bucket/run")
    assert storage.listdir("s3://no-such-bucket/run") == []
    storage.delete_folder("s3://no-such-bucket/run")


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
        assert client._client().meta.region_name == "eu-west-3"
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


def unfinished_uploads(s3, root):
    """Uploads below the root that have begun and neither ended nor been given up."""
    bucket, _, prefix = root.removeprefix("s3://").partition("/")
    return s3.client.list_multipart_uploads(Bucket=bucket, Prefix=prefix).get("Uploads", [])


@pytest.mark.parametrize("failing", [r"PUT .*partNumber=2", r"POST .*uploadId="])
def test_an_upload_that_fails_leaves_no_parts(failing, s3, root, faults, small_parts):
    storage.write_bytes(f"{root}/large", b"before")
    refusal = faults.add(Fault("status", failing, status=403, code="AccessDenied"))
    with pytest.raises(PermissionError, match=r"/large: S3 refuses access .*AccessDenied"):
        storage.write_bytes(f"{root}/large", DATA * 4)
    assert refusal.hits == 1
    assert unfinished_uploads(s3, root) == []
    assert storage.read_bytes(f"{root}/large") == b"before"


def test_an_upload_that_is_interrupted_leaves_no_parts(s3, root, small_parts, monkeypatch):
    def interrupt(*_):
        assert len(unfinished_uploads(s3, root)) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(client._Upload, "_complete", interrupt)
    with pytest.raises(KeyboardInterrupt):
        storage.write_bytes(f"{root}/large", DATA * 4)
    assert unfinished_uploads(s3, root) == []
    assert not storage.exists(f"{root}/large")


def test_parts_that_can_t_be_deleted_are_spoken_of(s3, root, faults, small_parts, caplog):
    faults.add(Fault("status", "PUT|DELETE", status=403, code="AccessDenied"))
    with pytest.raises(PermissionError, match="UploadPart"):
        storage.write_bytes(f"{root}/large", DATA * 4)
    assert re.search(r"parts of an upload that failed may stay .*/large: S3 refuses access .*AbortMulti", caplog.text)
    assert len(unfinished_uploads(s3, root)) == 1


@pytest.mark.parametrize("own", [True, False], ids=["done", "given up"])
def test_a_lost_reply_to_the_end_of_an_upload(own, root, faults, small_parts):
    """The next attempt hears that there is no such upload, from many servers, whether it is done or was given up."""
    storage.write_bytes(f"{root}/large", b"another's")
    if own:
        faults.add(Fault("reset", "POST .*uploadId=", times=1, at=0))
    faults.add(Fault("status", "POST .*uploadId=", status=404, code="NoSuchUpload"))
    if own:
        storage.write_bytes(f"{root}/large", DATA * 4)
        assert [fault.hits for fault in faults.faults] == [1, 1]
    else:
        with pytest.raises(OSError, match=r"/large: S3 failed \(the upload was ended by somebody else"):
            storage.write_bytes(f"{root}/large", DATA * 4)
    assert storage.read_bytes(f"{root}/large") == (DATA * 4 if own else b"another's")


def test_parts_grow_where_there_would_be_too_many(s3, root, bucket, small_parts, monkeypatch):
    monkeypatch.setattr(client, "MOST_PARTS", 2)
    storage.write_bytes(f"{root}/large", DATA * 4)
    etag = s3.client.head_object(Bucket=bucket, Key=f"{storage.name_of(root)}/large")["ETag"]
    assert etag.strip('"').endswith("-2")
    assert storage.read_bytes(f"{root}/large") == DATA * 4


def test_a_server_may_take_longer_for_writes_than_between_bytes_of_a_reply(root, faults, monkeypatch):
    monkeypatch.setattr(client, "READ_TIMEOUT_S", 0.3)
    faults.add(Fault("stall", "PUT", seconds=1.0))
    storage.write_bytes(f"{root}/object", DATA)
    assert len(faults.requests) == 1


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
def test_writes_outlast_transient_errors(fault, root, faults, hasty):
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


def test_a_failed_write_leaves_what_was_there(proxied, faults, hasty):
    faults.add(Fault("status", "PUT", status=500, code="InternalError"))
    with pytest.raises(OSError, match=r"folder/object: S3 failed \(.*InternalError"):
        storage.write_bytes(proxied, b"new", retry_s=0.3)
    assert storage.read_bytes(proxied) == DATA


# --- reads through transient errors


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
def test_reads_outlast_transient_errors_and_ask_for_what_is_missing_alone(fault, resumed_at, proxied, faults, hasty):
    faults.add(fault)
    assert read_through(proxied) == DATA
    assert fault.hits == fault.times
    starts = first_bytes(faults)
    assert len(starts) == fault.hits + 1
    # of what had come, at most the chunk that was under way is asked for again
    assert (starts[-1] > MIDDLE - client.CHUNK) if resumed_at else (starts[-1] == 0)


def test_a_small_file_is_read_the_same_way(proxied, faults, hasty):
    faults.add(Fault("truncate", times=2, at=MIDDLE))
    assert storage.read_bytes(proxied) == DATA
    assert len(first_bytes(faults)) == 2 + (SIZE - MIDDLE > MIDDLE)


def test_many_transient_errors_in_a_row(proxied, faults, hasty):
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
        assert read_through(proxied) == DATA
    assert all(fault.hits for fault in kinds)


def test_a_slow_body_is_no_failure(proxied, faults, hasty):
    faults.add(Fault("rate", bytes_per_s=5e6))
    assert read_through(proxied, retry_s=0.4) == DATA
    assert len(first_bytes(faults)) == 1


def test_an_object_replaced_meanwhile_is_read_anew(proxied, faults, monkeypatch):
    other = DATA[::-1]
    fault = faults.add(Fault("reset", times=1, at=MIDDLE))
    attempt = client.RetryBudget.wait

    def replace_then_wait(self, error):
        if fault.hits:
            storage.write_bytes(proxied, other)
            monkeypatch.setattr(client.RetryBudget, "wait", attempt)
        attempt(self, error)

    monkeypatch.setattr(client.RetryBudget, "wait", replace_then_wait)
    assert read_through(proxied) == other


def test_connections_are_used_again(url, s3):
    opened = []
    manager = client._client()._endpoint.http_session._manager
    for _ in range(5):
        read_through(url)
        opened = [manager.pools[key].num_connections for key in manager.pools.keys()]  # noqa: SIM118
    assert opened == [1]


# --- failures


def test_a_timeout_beyond_the_retry_budget_names_the_url_and_what_to_check(proxied, faults, hasty):
    faults.add(Fault("stall", at=MIDDLE, seconds=1.5))
    with pytest.raises(TimeoutError, match=r"folder/object: S3 cannot be reached .* check AWS_ENDPOINT_URL"):
        read_through(proxied, retry_s=0.2)


def test_errors_that_stay_are_raised_in_the_end(proxied, faults, hasty):
    faults.add(Fault("status", status=503))
    with pytest.raises(OSError, match=r"folder/object: S3 failed \(.*SlowDown"):
        read_through(proxied, retry_s=3.0)
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
        "read_into": lambda: read_through(url, 10, retry_s=client.BRIEF_RETRY_S),
        "read_bytes": lambda: storage.read_bytes(url, retry_s=client.BRIEF_RETRY_S),
        "exists": lambda: storage.exists(url),
        "listdir": lambda: storage.listdir(url),
        "write": lambda: storage.write_bytes(url, b"x", retry_s=client.BRIEF_RETRY_S),
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


def test_a_flipped_bit_gets_through(proxied, faults):
    """S3 over HTTP does not notice it: who needs to know compares checksums."""
    faults.add(Fault("flip", times=1, at=MIDDLE))
    got = read_through(proxied)
    assert [i for i in range(SIZE) if got[i] != DATA[i]] == [MIDDLE]
    assert read_through(proxied) == DATA
