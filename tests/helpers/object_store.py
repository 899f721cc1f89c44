"""An object store on this machine: moto's server at a port of its own, a bucket per test, and a proxy that fails."""

import logging
import os
import re
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
from botocore.loaders import JSONFileLoader, Loader

from pentode.checkpoint import objects
from pentode.checkpoint.manifest import MANIFEST, Manifest
from pentode.checkpoint.objects import Objects
from pentode.checkpoint.remote import facts_of
from tests.helpers.kill_run import pentode

_LOAD = JSONFileLoader.load_file
SECRET = "sEcReT" + 34 * "x"
FORGOTTEN = 60.0  # seconds after which the proxy drops a request that it holds back
TRY_AGAIN = '<?xml version="1.0"?><Error><Code>{code}</Code><Message>told by the proxy</Message></Error>'


@cache
def server() -> tuple[str, int]:
    """Host and port of moto's server, which runs in a thread until the tests end."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    return running.get_host_and_port()


@dataclass
class Bucket:
    """A bucket of moto's, and what the tests ask of it behind the client's back."""

    name: str

    @property
    def url(self) -> str:
        """The address of a run in it."""
        return f"s3://{self.name}/runs/a"

    def names(self) -> list[str]:
        """The names of all objects under `url`, without it."""
        return sorted(key.removeprefix("runs/a/") for key in self._objects())

    def published(self) -> list[int]:
        """The steps that have a manifest; each one's files are there with the right bytes, and no others."""
        names = self.names()
        found = sorted(int(name.split("/")[0]) for name in names if name.endswith(f"/{MANIFEST}"))
        for step in found:
            manifest = Manifest.parse(self.read(f"{step}/{MANIFEST}"))
            assert {name.split("/")[1] for name in names if name.startswith(f"{step}/")} == {*manifest.files, MANIFEST}
            for name, facts in manifest.files.items():
                assert facts_of(self.read(f"{step}/{name}")) == facts, f"{step}/{name}"
        return found

    def read(self, name: str) -> bytes:
        """An object's bytes."""
        return self._objects()[f"runs/a/{name}"].value

    def change(self, name: str, data: bytes) -> None:
        """Put other bytes in an object's place."""
        self._moto().put_object(self.name, f"runs/a/{name}", data)

    def remove(self, name: str) -> None:
        """Take an object away."""
        self._moto().delete_object(self.name, f"runs/a/{name}")

    def unfinished(self) -> int:
        """How many uploads in parts are neither complete nor aborted."""
        return len(self._moto().get_bucket(self.name).multiparts)

    def begin_upload(self, name: str) -> None:
        """Leave an upload in parts unfinished."""
        Objects(self.url)._once("create_multipart_upload", Key=f"runs/a/{name}")

    def _objects(self) -> dict[str, Any]:
        return dict(self._moto().get_bucket(self.name).keys.items())

    def _moto(self) -> Any:
        from moto.s3.models import s3_backends

        return s3_backends["123456789012"]["aws"]


def patch_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have botocore read its descriptions of AWS once, not for each client: they are most of what a client costs."""
    monkeypatch.setattr(JSONFileLoader, "load_file", lambda self, path: _description(path))
    monkeypatch.setattr(Loader, "list_available_services", lambda self, type_name: ["s3", "sts"])


@cache
def _description(path: str) -> Any:
    return _LOAD(JSONFileLoader(), path)


@contextmanager
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A bucket, with an environment in which S3 is moto's server."""
    host, port = server()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    settings = {
        "AWS_ACCESS_KEY_ID": "AKIA" + 16 * "T",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    patch_loading(monkeypatch)
    made = Bucket(f"bucket-{secrets.token_hex(6)}")
    made._moto().create_bucket(made.name, "us-east-1")
    yield made


def smaller_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have moto take parts of less than 5 MiB."""
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 1)


def pentode_in_parts(environment: dict[str, str], *arguments: str) -> None:
    """`python -m pentode` as a `kill_run.Target`, with another environment and parts of 16 KiB."""
    os.environ.update(environment)
    objects.PART = 16 * 2**10
    pentode(*arguments)


@dataclass
class FakeTime:
    """A clock that goes on when somebody waits, and at no other time."""

    time: float = 0.0
    waits: list[float] = field(default_factory=list)

    def now(self) -> float:
        return self.time

    def wait(self, event: threading.Event, seconds: float) -> None:
        self.waits.append(seconds)
        self.time += seconds


@dataclass(frozen=True)
class Fault:
    """What the proxy does with a request.

    answer       this status instead of passing it on, with `code` in the body
    sent         the connection is cut when this fraction of the request's bytes has passed
    received     the same of the answer's
    change       what becomes of the answer's body; the header's length is mended
    held         no answer at all; the connection is closed when this is set
    """

    answer: int | None = None
    code: str = "InternalError"
    sent: float | None = None
    received: float | None = None
    change: Callable[[bytes], bytes] | None = None
    held: threading.Event | None = None


Plan = Callable[[str, int], Fault | None]  # a request's "PUT /bucket/key?query" and its number; what to do with it


class Proxy:
    """Stands between a client and moto's server; every request is asked about, and faults are counted."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.requests: list[str] = []
        self.faults = 0
        self.forgotten = False  # whether a client waited for an answer for longer than it should
        self._lock = threading.Lock()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def __enter__(self) -> "Proxy":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            head = _head(client)
            if not head:
                return
            request = " ".join(head.split(b"\r\n", 1)[0].decode().split(" ")[:2])
            with self._lock:
                number = len(self.requests)
                self.requests.append(request)
            fault = self.plan(request, number)
            self.faults += fault is not None
            self._pass(client, head, fault or Fault())

    def _pass(self, client: socket.socket, head: bytes, fault: Fault) -> None:
        if fault.held is not None:
            self.forgotten |= not fault.held.wait(FORGOTTEN)
            return
        body = _body(client, head)
        if fault.answer is not None:
            text = TRY_AGAIN.format(code=fault.code).encode()
            head = f"HTTP/1.1 {fault.answer} X\r\nContent-Length: {len(text)}\r\nConnection: close\r\n\r\n".encode()
            client.sendall(head + text)
            return
        with socket.create_connection(server()) as upstream:
            sent = _without_expect(head) + body
            if fault.sent is not None:
                upstream.sendall(sent[: int(fault.sent * len(sent))])
                return
            upstream.sendall(sent)
            answer = _all(upstream)
        if fault.change is not None:
            answer = _changed(answer, fault.change)
        client.sendall(answer if fault.received is None else answer[: int(fault.received * len(answer))])


def _head(client: socket.socket) -> bytes:
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        more = client.recv(1)
        if not more:
            return b""
        head += more
    return head


def _body(client: socket.socket, head: bytes) -> bytes:
    if b"100-continue" in head.lower():
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    found = re.search(rb"\r\ncontent-length: (\d+)", head, re.IGNORECASE)
    left, body = int(found[1]) if found else 0, bytearray()
    while left > 0 and (more := client.recv(min(left, 1 << 20))):
        body += more
        left -= len(more)
    return bytes(body)


def _without_expect(head: bytes) -> bytes:
    head = re.sub(rb"\r\nexpect: [^\r]*", b"", head, flags=re.IGNORECASE)
    return re.sub(rb"\r\nconnection: [^\r]*", b"", head, flags=re.IGNORECASE)[:-2] + b"Connection: close\r\n\r\n"


def _all(upstream: socket.socket) -> bytes:
    found = bytearray()
    while more := upstream.recv(1 << 20):
        found += more
    return bytes(found)


def _changed(answer: bytes, change: Callable[[bytes], bytes]) -> bytes:
    head, _, body = answer.partition(b"\r\n\r\n")
    body = change(body)
    head = re.sub(rb"(content-length: )\d+", lambda m: m[1] + str(len(body)).encode(), head, flags=re.IGNORECASE)
    return head + b"\r\n\r\n" + body


class Gate:
    """A plan that holds back one of the requests that fit a pattern, the `number`-th from 0, for good."""

    def __init__(self, pattern: str, number: int = 0) -> None:
        self.pattern, self.number, self.count = re.compile(pattern), number, 0
        self.reached, self.opened = threading.Event(), threading.Event()
        self._lock = threading.Lock()

    def __call__(self, request: str, _: int) -> Fault | None:
        if not self.pattern.search(request):
            return None
        with self._lock:
            self.count += 1
            if self.count - 1 != self.number:
                return None
        self.reached.set()
        return Fault(held=self.opened)
