"""The S3 side of the door to storage: reads that resume, and failures that say what to check.

Reads go through botocore's client, which costs least; all else through s3fs. Both find credentials,
region and endpoint where AWS's own tools do. What may pass (5xx, throttling, resets, timeouts, bodies cut
short) is tried again with growing pauses until nothing has moved for as long as the caller's patience
lasts. Failures are ``OSError``s that name the URL: ``FileNotFoundError``, ``PermissionError``,
``TimeoutError``, ``ConnectionError``, or plain.
"""

import functools
import os
import random
import threading
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any, TypeVar

import botocore.exceptions as aws
import botocore.session
from botocore.config import Config
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

PATIENCE_S = 60.0  # for shards and writes, on which a run depends
BRIEF_PATIENCE_S = 12.0  # for small files and checks; a stalled reply (READ_TIMEOUT_S) is still asked for again
CONNECT_TIMEOUT_S = 3.0
READ_TIMEOUT_S = 10.0  # silence that means a dead connection
REPLY_TIMEOUT_S = 30.0  # the same for s3fs, to which a server may answer late, when it has put an upload together
ATTEMPTS = 2  # of each request of s3fs: a part that fails doesn't take its whole upload along
PATIENT_ATTEMPTS = 8  # the same where nobody tries again: about half a minute
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
CONNECTIONS = 32
CHUNK = 1 << 20  # bytes taken from a reply at a time
PART = 16 << 20  # bytes of one part of an upload; two or more of them go up as parts
PARTS_AT_ONCE = 4

Result = TypeVar("Result")

NO_CREDENTIALS = (
    aws.NoCredentialsError,
    aws.PartialCredentialsError,
    aws.CredentialRetrievalError,
    aws.ProfileNotFound,
    aws.NoAuthTokenError,
    aws.TokenRetrievalError,
    aws.SSOError,
    aws.LoginError,
)
SILENT = (aws.ReadTimeoutError, aws.ConnectTimeoutError, TimeoutError)
DISTURBED = (
    *SILENT,
    aws.HTTPClientError,
    aws.ConnectionError,
    aws.IncompleteReadError,
    ResponseParserError,
    HTTPError,
    ConnectionError,
)
FAILURES = (aws.BotoCoreError, aws.ClientError, HTTPError, OSError)
CONDITION_NOT_MET = (404, 409, 412)  # deleted meanwhile; written at the same moment; not the version
BUSY = {"SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "RequestLimitExceeded"}
STALE_CREDENTIALS = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired"}

_jitter = random.Random()  # its own, since the global generator's state belongs to the run
_lock = threading.Lock()


def read_into(url: str, buffer: memoryview, offset: int = 0, patience_s: float = PATIENCE_S) -> int:
    """Fill ``buffer`` from the object's byte ``offset`` on; a ``ValueError`` when the object ends before.

    Returns:
        How many more attempts than one it took.
    """
    patience = _Patience(url, patience_s)
    if buffer.nbytes:  # HTTP has no empty ranges
        _Download(url, offset, buffer.cast("B")).run(patience)
    return patience.retries


def read(url: str, offset: int = 0, length: int | None = None, patience_s: float = BRIEF_PATIENCE_S) -> bytes:
    """``length`` bytes of the object from ``offset``, or all of them; a ``ValueError`` when there are fewer."""
    if length == 0:
        return b""
    space = None if length is None else memoryview(bytearray(length))
    return bytes(_Download(url, offset, space).run(_Patience(url, patience_s)))


def write(url: str, data: bytes, patience_s: float = PATIENCE_S) -> None:
    """Write an object, in parts when it is large; it appears when all of it is there."""
    _patiently(
        url, patience_s, lambda files, path: files.pipe_file(path, data, chunksize=PART, max_concurrency=PARTS_AT_ONCE)
    )


def read_tagged(url: str) -> tuple[bytes, str | None]:
    """All bytes of the object, and the tag that names this version of it."""
    download = _Download(url, 0, None)
    return bytes(download.run(_Patience(url, BRIEF_PATIENCE_S))), download.tag


def write_if(url: str, data: bytes, tag: str | None) -> str | None:
    """Write a small object if it still bears ``tag``, or if there is none where that is none.

    A server that says that it knows no conditions writes without.

    Returns:
        The new tag; none where the condition was not met.
    """
    bucket, _, key = url.removeprefix("s3://").partition("/")
    condition = {"IfMatch": tag} if tag else {"IfNoneMatch": "*"}
    patience = _Patience(url, BRIEF_PATIENCE_S)
    while True:
        try:
            return str(_client().put_object(Bucket=bucket, Key=key, Body=data, **condition)["ETag"])
        except FAILURES as error:
            status, code = _answer(error)
            if status in CONDITION_NOT_MET and code != "NoSuchBucket":
                return None
            if status == 501 and condition:
                condition = {}
            else:
                patience.wait(error)


def exists(url: str) -> bool:
    """Whether an object is there, or any below the URL."""
    try:
        _patiently(url, BRIEF_PATIENCE_S, lambda files, path: files.info(path))
    except FileNotFoundError:
        return False
    return True


def listdir(url: str) -> list[str]:
    """URLs directly below ``url``, without their scheme; ``FileNotFoundError`` when there are none."""
    found: list[str] = _patiently(url, BRIEF_PATIENCE_S, lambda files, path: files.ls(path, detail=False))
    return [entry for entry in found if f"s3://{entry.rstrip('/')}" != url]  # some servers list the folder itself


def delete(url: str) -> None:
    """Delete an object; nothing there is fine, and what lies below the URL stays."""
    _patiently(url, BRIEF_PATIENCE_S, lambda files, path: files.rm_file(path))


def delete_folder(url: str) -> None:
    """Delete all below the URL, but no object of that very name; nothing there is fine."""

    def action(files: Any, path: str) -> None:
        for found in files.find(path):
            if found.startswith(f"{path}/"):
                files.rm_file(found)

    _patiently(url, BRIEF_PATIENCE_S, action)


def filesystem(attempts: int = PATIENT_ATTEMPTS) -> Any:
    """S3 as an fsspec file system that makes each request up to ``attempts`` times."""
    import s3fs  # takes a quarter of a second, and reading does without

    return s3fs.S3FileSystem(
        use_listings_cache=False,
        client_kwargs=_region(),
        config_kwargs=_config(REPLY_TIMEOUT_S, attempts=attempts),
    )


class _Patience:
    """Pauses between attempts, longer each time, until nothing has moved for ``limit_s`` seconds."""

    def __init__(self, url: str, limit_s: float) -> None:
        self._url = url
        self._limit_s = limit_s
        self.retries = 0
        self.renew()

    def renew(self) -> None:
        """Something moved: count from now on."""
        self._since = time.monotonic()
        self._pause_s = FIRST_PAUSE_S

    def wait(self, error: Exception) -> None:
        """Pause before another attempt, or raise what the error means when another has no point."""
        left_s = self._since + self._limit_s - time.monotonic()
        if left_s <= 0 or not _may_pass(error):
            raise _explained(self._url, error) from error
        time.sleep(min(left_s, self._pause_s * _jitter.uniform(0.5, 1.0)))
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        self.retries += 1


class _Download:
    """Bytes of an object on their way into memory, resumed where an attempt broke off."""

    def __init__(self, url: str, offset: int, space: memoryview | None) -> None:
        self._url = url
        self._bucket, _, self._key = url.removeprefix("s3://").partition("/")
        self._offset = offset
        self._given = space
        self._furthest = 0
        self._restart()

    @property
    def tag(self) -> str | None:
        """The server's name for this version of the object, once its bytes are there."""
        return self._etag

    def run(self, patience: _Patience) -> memoryview:
        """Fetch all of it, in as many attempts as it takes."""
        while True:
            try:
                return self._attempt(patience)
            except FAILURES as error:
                patience.wait(error)

    def _restart(self) -> None:
        self._space = self._given
        self._done = 0
        self._etag: str | None = None

    def _attempt(self, patience: _Patience) -> memoryview:
        reply = self._request()
        with closing(reply["Body"]) as body:  # a connection closed before its end is not used again
            space = self._accept(reply)
            while self._done < len(space):
                self._done += body.readinto(space[self._done : self._done + CHUNK])  # raises at an early end
                if self._done > self._furthest:  # an object that changes all the time gets nowhere
                    self._furthest = self._done
                    patience.renew()
        return space

    def _request(self) -> dict[str, Any]:
        first = self._offset + self._done
        last = "" if self._space is None else self._offset + len(self._space) - 1
        wanted = {"Range": f"bytes={first}-{last}"} if (first, last) != (0, "") else {}
        try:
            reply: dict[str, Any] = _client().get_object(Bucket=self._bucket, Key=self._key, **wanted)
        except aws.ClientError as error:
            if _answer(error)[0] != 416:  # the range begins behind the object's end
                raise
            if self._done:
                self._start_again()
            raise self._too_short(0) from error
        if first and not reply.get("ContentRange", "").startswith(f"bytes {first}-"):
            raise OSError(f"the server answers a request for bytes from {first} with {reply.get('ContentRange')}")
        return reply

    def _accept(self, reply: dict[str, Any]) -> memoryview:
        """Where the reply's bytes go, once it is known to continue what came before."""
        if self._etag not in (None, reply.get("ETag")):
            self._start_again()
        self._etag = reply.get("ETag")
        if self._space is None:
            self._space = memoryview(bytearray(reply["ContentLength"]))
        if self._done + reply["ContentLength"] < len(self._space):
            raise self._too_short(self._done + reply["ContentLength"])
        return self._space

    def _start_again(self) -> None:
        self._restart()
        raise ConnectionError("the object was replaced while it was read")

    def _too_short(self, present: int) -> ValueError:
        wanted = "all" if self._space is None else len(self._space)
        return ValueError(
            f"{self._url}: {wanted} bytes from {self._offset} were asked for, the file has {present} of them"
        )


def _patiently(url: str, patience_s: float, action: Callable[[Any, str], Result]) -> Result:
    patience = _Patience(url, patience_s)
    while True:
        try:
            return action(filesystem(ATTEMPTS), url.removeprefix("s3://"))
        except FAILURES as error:
            patience.wait(error)


def _client() -> Any:
    with _lock:  # making a client takes long, and many threads may want the first
        return client_of(os.getpid())


@functools.cache
def client_of(process: int) -> Any:
    """The process's botocore client, which its threads share; connections don't survive a fork."""
    config = Config(**_config(READ_TIMEOUT_S, attempts=1))  # what is tried again is decided here, not there
    return botocore.session.get_session().create_client("s3", config=config, **_region())


def _config(read_timeout_s: float, attempts: int) -> dict[str, Any]:
    return {
        "connect_timeout": CONNECT_TIMEOUT_S,
        "read_timeout": read_timeout_s,
        "max_pool_connections": CONNECTIONS,
        "tcp_keepalive": True,
        "retries": {"mode": "standard", "total_max_attempts": attempts},
        # not every server knows the newer checksums
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }


def _region() -> dict[str, str]:
    # botocore itself reads AWS_DEFAULT_REGION alone
    return {"region_name": os.environ["AWS_REGION"]} if os.environ.get("AWS_REGION") else {}


def _answer(error: Exception) -> tuple[int, str]:
    """The HTTP status and S3 code that the server answered with; (0, "") when it didn't answer."""
    # s3fs raises OSErrors in place of botocore's errors, which it keeps as their cause
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    if not isinstance(response, dict):
        return 0, ""
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)), str(response["Error"].get("Code", ""))


def _may_pass(error: Exception) -> bool:
    status, code = _answer(error)
    if status:
        return status in (408, 429) or (status >= 500 and status != 501) or code in BUSY
    return isinstance(error, DISTURBED)


def _explained(url: str, error: Exception) -> OSError:
    """What the failure means, and what to check."""
    status, code = _answer(error)
    reason = error.__cause__ if status and error.__cause__ else error
    if isinstance(error, NO_CREDENTIALS):
        return PermissionError(
            f"{url}: no S3 credentials ({reason}); set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if code == "NoSuchBucket":
        return FileNotFoundError(f"{url}: there is no such bucket; check its name and AWS_ENDPOINT_URL")
    if status == 404 or isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{url}: nothing is there; check the path")
    if status in (401, 403) or code in STALE_CREDENTIALS:
        return PermissionError(
            f"{url}: S3 refuses access ({reason}); check AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "and what they may do with the bucket"
        )
    hint = "check AWS_ENDPOINT_URL, AWS_REGION and the network"
    if status == 0 and isinstance(error, DISTURBED):
        kind = TimeoutError if isinstance(error, SILENT) else ConnectionError
        return kind(f"{url}: S3 cannot be reached ({reason}); {hint}")
    return OSError(f"{url}: S3 failed ({reason}); {hint}")
