"""The S3 side of the door to storage: reads that resume, uploads in parts, and failures that say what to check.

All of it goes through botocore's client, which threads share; s3fs is there for libraries that want a file system.
Both find credentials, region and endpoint where AWS's own tools do. A request that meets a transient error (5xx,
throttling, a reset, a timeout, a body cut short) is made again after growing pauses, until nothing has moved for
as long as the caller's retry budget allows. Failures are ``OSError``s that name the URL: ``FileNotFoundError``,
``PermissionError``, ``TimeoutError``, ``ConnectionError``, or plain.
"""

import functools
import logging
import os
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from typing import Any, TypeVar

import botocore.exceptions as aws
import botocore.session
from botocore.config import Config
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

# a request is given up when nothing has moved for so long
RETRY_S = 60.0  # for shards and writes, on which a run depends
BRIEF_RETRY_S = 12.0  # for small files and checks; a stalled reply (READ_TIMEOUT_S) is still asked for again
CONNECT_TIMEOUT_S = 3.0
READ_TIMEOUT_S = 10.0  # silence that means a dead connection
REPLY_TIMEOUT_S = 30.0  # the same after an upload, which a server may take a while to put together
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
CONNECTIONS = 32
CHUNK = 1 << 20  # bytes taken from a reply at a time
PART = 16 << 20  # bytes of one part of an upload; two or more of them go up as parts
MOST_PARTS = 10_000  # of an upload, by S3's rules; larger objects have larger parts
PARTS_AT_ONCE = 4  # which are copied in memory
DELETES_AT_ONCE = 16
PAGE = 1000  # keys in a reply to a listing, the most that S3 gives
FILESYSTEM_ATTEMPTS = 8  # of each request of s3fs, whose users don't try again: about half a minute
UPLOAD_TOKEN = "upload-token"  # in an object's metadata, where it went up in parts

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
TIMEOUTS = (aws.ReadTimeoutError, aws.ConnectTimeoutError, TimeoutError)
TRANSIENT_ERRORS = (
    *TIMEOUTS,
    aws.HTTPClientError,
    aws.ConnectionError,
    aws.IncompleteReadError,
    ResponseParserError,
    HTTPError,
    ConnectionError,
)
FAILURES = (aws.BotoCoreError, aws.ClientError, HTTPError, OSError)
CONDITION_NOT_MET = (404, 409, 412)  # deleted meanwhile; written at the same moment; not the version
# throttling, and a request that came too slowly, where a server answers with a status for other things
TRANSIENT_CODES = {"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "RequestTimeout"}
STALE_CREDENTIALS = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired"}

logger = logging.getLogger(__name__)
_jitter = random.Random()  # its own, since the global generator's state belongs to the run
_lock = threading.Lock()


def read_into(url: str, buffer: memoryview, offset: int = 0, retry_s: float = RETRY_S) -> int:
    """Fill ``buffer`` from the object's byte ``offset`` on; a ``ValueError`` when the object ends before.

    Returns:
        How many more attempts than one it took.
    """
    budget = RetryBudget(url, retry_s)
    if buffer.nbytes:  # HTTP has no empty ranges
        _Download(url, offset, buffer.cast("B")).run(budget)
    return budget.retries


def read(url: str, offset: int = 0, length: int | None = None, retry_s: float = BRIEF_RETRY_S) -> bytes:
    """``length`` bytes of the object from ``offset``, or all of them; a ``ValueError`` when there are fewer."""
    if length == 0:
        return b""
    space = None if length is None else memoryview(bytearray(length))
    return bytes(_Download(url, offset, space).run(RetryBudget(url, retry_s)))


def write(url: str, data: bytes, retry_s: float = RETRY_S) -> None:
    """Write an object, in parts when it is large; it appears when all of it is there."""
    if len(data) < 2 * PART:
        _retry(url, retry_s, lambda s3: s3.put_object(**_object(url), Body=data), REPLY_TIMEOUT_S)
    else:
        _Upload(url, data, retry_s).run()


def read_tagged(url: str) -> tuple[bytes, str | None]:
    """All bytes of the object, and the tag that names this version of it."""
    download = _Download(url, 0, None)
    return bytes(download.run(RetryBudget(url, BRIEF_RETRY_S))), download.tag


def write_if(url: str, data: bytes, tag: str | None) -> str | None:
    """Write a small object if it still bears ``tag``, or if there is none where that is none.

    A server that says that it knows no conditions writes without.

    Returns:
        The new tag; none where the condition was not met.
    """
    condition = {"IfMatch": tag} if tag else {"IfNoneMatch": "*"}
    budget = RetryBudget(url, BRIEF_RETRY_S)
    while True:
        try:
            return str(_client().put_object(**_object(url), Body=data, **condition)["ETag"])
        except FAILURES as error:
            status, code = _answer(error)
            if status in CONDITION_NOT_MET and code != "NoSuchBucket":
                return None
            if status == 501 and condition:
                condition = {}
            else:
                budget.wait(error)


def exists(url: str) -> bool:
    """Whether an object is there, or any below the URL."""
    with suppress(FileNotFoundError):
        if _object(url)["Key"]:
            _retry(url, BRIEF_RETRY_S, lambda s3: s3.head_object(**_object(url)))
            return True
    with suppress(FileNotFoundError):  # there is no such bucket
        return any("Contents" in page for page in _list(url, MaxKeys=1))
    return False


def listdir(url: str) -> list[str]:
    """Names directly below ``url``; ``FileNotFoundError`` when there are none."""
    prefix = _prefix(url)
    names: set[str] = set()
    for page in _list(url, Delimiter="/"):
        found = [entry["Key"] for entry in page.get("Contents", [])]
        found += [entry["Prefix"] for entry in page.get("CommonPrefixes", [])]
        names |= {key.removeprefix(prefix).rstrip("/") for key in found}
    names -= {""}  # an object that stands for the folder itself
    if not names:
        raise FileNotFoundError(f"{url}: nothing is there; check the path")
    return sorted(names)


def delete(url: str) -> None:
    """Delete an object; nothing there is fine, and what lies below the URL stays."""
    with suppress(FileNotFoundError):  # as some servers answer
        _retry(url, BRIEF_RETRY_S, lambda s3: s3.delete_object(**_object(url)))


def delete_folder(url: str) -> None:
    """Delete all below the URL, but no object of that very name; nothing there is fine.

    The error names the first object that can't be deleted; others may stay as well then.
    """
    bucket = _object(url)["Bucket"]
    keys = [entry["Key"] for page in _list(url) for entry in page.get("Contents", [])]
    # one by one, since not all servers delete many by one request, and some want an MD5 with it that botocore omits
    with ThreadPoolExecutor(DELETES_AT_ONCE) as pool:
        list(pool.map(delete, [f"s3://{bucket}/{key}" for key in keys]))


def filesystem() -> Any:
    """S3 as an fsspec file system."""
    import s3fs  # takes a quarter of a second, and all else does without

    return s3fs.S3FileSystem(
        use_listings_cache=False,
        client_kwargs=_region(),
        config_kwargs=_config(REPLY_TIMEOUT_S, FILESYSTEM_ATTEMPTS),
    )


class RetryBudget:
    """Time for further attempts: they pause longer each time, until nothing has moved for ``limit_s`` seconds."""

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
        if left_s <= 0 or not _is_transient(error):
            raise _explain(self._url, error) from error
        time.sleep(min(left_s, self._pause_s * _jitter.uniform(0.5, 1.0)))
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        self.retries += 1


class _Download:
    """Bytes of an object on their way into memory, resumed where an attempt broke off."""

    def __init__(self, url: str, offset: int, space: memoryview | None) -> None:
        self._url = url
        self._offset = offset
        self._given = space
        self._furthest = 0
        self._restart()

    @property
    def tag(self) -> str | None:
        """The server's name for this version of the object, once its bytes are there."""
        return self._etag

    def run(self, budget: RetryBudget) -> memoryview:
        """Fetch all of it, in as many attempts as it takes."""
        while True:
            try:
                return self._attempt(budget)
            except FAILURES as error:
                budget.wait(error)

    def _restart(self) -> None:
        self._space = self._given
        self._done = 0
        self._etag: str | None = None

    def _attempt(self, budget: RetryBudget) -> memoryview:
        reply = self._request()
        with closing(reply["Body"]) as body:  # a connection closed before its end is not used again
            space = self._accept(reply)
            while self._done < len(space):
                self._done += body.readinto(space[self._done : self._done + CHUNK])  # raises at an early end
                if self._done > self._furthest:  # an object that changes all the time gets nowhere
                    self._furthest = self._done
                    budget.renew()
        return space

    def _request(self) -> dict[str, Any]:
        first = self._offset + self._done
        last = "" if self._space is None else self._offset + len(self._space) - 1
        wanted = {"Range": f"bytes={first}-{last}"} if (first, last) != (0, "") else {}
        try:
            reply: dict[str, Any] = _client().get_object(**_object(self._url), **wanted)
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


class _Upload:
    """A large object on its way to S3 in parts, of which nothing shows before all of them are there."""

    def __init__(self, url: str, data: bytes, retry_s: float) -> None:
        self._url = url
        self._data = data
        self._retry_s = retry_s
        self._token = uuid.uuid4().hex

    def run(self) -> None:
        """Send all of it, or leave nothing."""
        begun = self._request(
            lambda s3: s3.create_multipart_upload(**_object(self._url), Metadata={UPLOAD_TOKEN: self._token})
        )
        self._upload = {**_object(self._url), "UploadId": begun["UploadId"]}
        try:
            parts = self._send_parts()
            self._request(lambda s3: self._complete(s3, parts))
        except BaseException:  # an interruption as well
            self._abort()
            raise

    def _send_parts(self) -> list[dict[str, Any]]:
        size = max(PART, -(-len(self._data) // MOST_PARTS))

        def send(start: int) -> dict[str, Any]:
            number, body = start // size + 1, self._data[start : start + size]
            reply = self._request(lambda s3: s3.upload_part(**self._upload, PartNumber=number, Body=body))
            return {"PartNumber": number, "ETag": reply["ETag"]}

        with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
            return list(pool.map(send, range(0, len(self._data), size)))  # the first failure cancels what hasn't begun

    def _complete(self, s3: Any, parts: Sequence[dict[str, Any]]) -> None:
        try:
            s3.complete_multipart_upload(**self._upload, MultipartUpload={"Parts": parts})
        except s3.exceptions.NoSuchUpload:  # done already, if the reply to an attempt before was lost
            if s3.head_object(**_object(self._url))["Metadata"].get(UPLOAD_TOKEN) != self._token:
                raise OSError("the upload was ended by somebody else") from None

    def _abort(self) -> None:
        try:
            _retry(self._url, BRIEF_RETRY_S, lambda s3: s3.abort_multipart_upload(**self._upload))
        except FileNotFoundError:
            pass  # S3 knows nothing of it
        except OSError as error:
            logger.warning("parts of an upload that failed may stay on S3, which bills them: %s", error)

    def _request(self, request: Callable[[Any], Any]) -> Any:
        return _retry(self._url, self._retry_s, request, REPLY_TIMEOUT_S)


def _retry(url: str, retry_s: float, request: Callable[[Any], Result], read_timeout_s: float | None = None) -> Result:
    """What ``request`` returns, which is given a client and called again after transient errors."""
    budget = RetryBudget(url, retry_s)
    while True:
        try:
            return request(_client(read_timeout_s))
        except FAILURES as error:
            budget.wait(error)


def _list(url: str, **options: Any) -> Iterator[dict[str, Any]]:
    """Replies that list what lies below the URL, each with up to ``PAGE`` keys."""
    request = {"Bucket": _object(url)["Bucket"], "Prefix": _prefix(url), "MaxKeys": PAGE, **options}
    while True:
        page: dict[str, Any] = _retry(url, BRIEF_RETRY_S, lambda s3: s3.list_objects_v2(**request))
        yield page
        if not page.get("IsTruncated"):
            return
        request["ContinuationToken"] = page["NextContinuationToken"]


def _object(url: str) -> dict[str, str]:
    """The URL as requests name it."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return {"Bucket": bucket, "Key": key}


def _prefix(url: str) -> str:
    """What the keys of all objects below the URL begin with."""
    key = _object(url)["Key"]
    return f"{key}/" if key else ""


def _client(read_timeout_s: float | None = None) -> Any:
    with _lock:  # making a client takes long, and many threads may want the first
        return client_of(os.getpid(), read_timeout_s or READ_TIMEOUT_S)


@functools.cache
def client_of(process: int, read_timeout_s: float) -> Any:
    """A botocore client of the process, which its threads share; connections don't survive a fork."""
    config = Config(**_config(read_timeout_s, attempts=1))  # what is tried again is decided here, not there
    return session_of(process).create_client("s3", config=config, **_region())


@functools.cache
def session_of(process: int) -> Any:
    """What the process's clients have in common: credentials, and a description of S3 that takes long to read."""
    return botocore.session.get_session()


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
    response = getattr(error, "response", None)
    if not isinstance(response, dict):
        return 0, ""
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)), str(response["Error"].get("Code", ""))


def _is_transient(error: Exception) -> bool:
    status, code = _answer(error)
    if status:
        return status in (408, 429) or (status >= 500 and status != 501) or code in TRANSIENT_CODES
    return isinstance(error, TRANSIENT_ERRORS)


def _explain(url: str, error: Exception) -> OSError:
    """What the failure means, and what to check."""
    status, code = _answer(error)
    if isinstance(error, NO_CREDENTIALS):
        return PermissionError(
            f"{url}: no S3 credentials ({error}); set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if code == "NoSuchBucket":
        return FileNotFoundError(f"{url}: there is no such bucket; check its name and AWS_ENDPOINT_URL")
    if status == 404 or isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{url}: nothing is there; check the path")
    if status in (401, 403) or code in STALE_CREDENTIALS:
        return PermissionError(
            f"{url}: S3 refuses access ({error}); check AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "and what they may do with the bucket"
        )
    hint = "check AWS_ENDPOINT_URL, AWS_REGION and the network"
    if status == 0 and isinstance(error, TRANSIENT_ERRORS):
        kind = TimeoutError if isinstance(error, TIMEOUTS) else ConnectionError
        return kind(f"{url}: S3 cannot be reached ({error}); {hint}")
    return OSError(f"{url}: S3 failed ({error}); {hint}")
