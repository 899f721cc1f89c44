"""An object store's files under one address, s3://bucket/prefix: listed, read, written, removed; every call patient.

s3fs, fsspec's S3, finds credentials and the endpoint as all AWS tools do (environment, profile, role) and talks to the
store; its own repetitions are off, since `retry.Patience` bounds all of them. Large objects go and come in parts,
several at a time.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from pentode.checkpoint.ahead import ahead
from pentode.checkpoint.retry import GivenUpError, PassingError, Patience
from pentode.checkpoint.s3_errors import RENEWS, AbsentError, code_of, understood
from pentode.config.places import bucket_and_prefix
from pentode.errors import ConfigError, StorageError

PART = 16 * 2**20  # bytes sent or asked for in one request
MOST_PARTS = 9000  # of an object; S3 allows 10,000
REMOVED_AT_ONCE = 1000  # the most that S3 takes
CONNECTIONS = 128  # at most, to the store
SECONDS = 60.0  # without a byte of an answer, after which a connection counts as lost
WHOLE = 3.0  # times as long for all of a request of at most PART bytes: nothing else notices that none of it is taken

T = TypeVar("T")


@dataclass(frozen=True)
class Found:
    """What a listing says of an object."""

    size: int
    modified: datetime


class Objects:
    """The objects under an address, named by what follows it; `parts` of one are under way at a time."""

    def __init__(self, url: str, *, parts: int = 4, seconds: float = SECONDS) -> None:
        self.url = url.rstrip("/")
        self.bucket, prefix = bucket_and_prefix(url)
        self.prefix = f"{prefix}/" if prefix else ""
        self.parts, self.seconds = parts, seconds
        self._store = self._connected()

    def under(self, patience: Patience, name: str = "", *, deep: bool = True) -> dict[str, Found | None]:
        """All objects whose names begin with `name`; not `deep`: "40/", and None, for all that begin so."""
        found: dict[str, Found | None] = {}
        asked: dict[str, Any] = {"Prefix": self.prefix + name} | ({} if deep else {"Delimiter": "/"})
        while True:
            page = self._call(patience, "list_objects_v2", **asked)
            for one in page.get("Contents", ()):
                found[one["Key"].removeprefix(self.prefix)] = Found(one["Size"], one["LastModified"])
            for one in page.get("CommonPrefixes", ()):
                found[one["Prefix"].removeprefix(self.prefix)] = None
            if not page.get("IsTruncated"):
                return found
            asked["ContinuationToken"] = page["NextContinuationToken"]

    def find(self, patience: Patience, name: str) -> Found | None:
        """An object's size and time; None where it is not there."""
        page = self._call(patience, "list_objects_v2", Prefix=self.prefix + name, MaxKeys=1)  # HEAD tells no reasons
        for one in page.get("Contents", ()):
            if one["Key"] == self.prefix + name:
                return Found(one["Size"], one["LastModified"])
        return None

    def read(self, patience: Patience, name: str, size: int) -> Iterator[bytes]:
        """An object's `size` bytes in order, in pieces; raises AbsentError where it is not there, or is shorter."""
        spans = [(start, min(start + PART, size)) for start in range(0, size, PART)]
        return ahead(lambda span: self._span(patience, name, *span), spans, workers=min(self.parts, len(spans)))

    def write(self, patience: Patience, name: str, data: bytes) -> None:
        """Make a small object, or replace it."""
        self._call(patience, "put_object", Key=self.prefix + name, Body=data)

    def write_file(self, patience: Patience, name: str, path: Path) -> None:
        """Make an object of a file, or replace it; it appears when it is whole, or not at all."""
        size = path.stat().st_size
        if size <= PART:
            self.write(patience, name, path.read_bytes())
            return
        key, part = self.prefix + name, max(PART, -(-size // MOST_PARTS))
        made = self._call(patience, "create_multipart_upload", Key=key)["UploadId"]

        def send(number: int) -> dict[str, Any]:
            with path.open("rb") as file:
                file.seek((number - 1) * part)
                data = file.read(part)
            sent = self._call(patience, "upload_part", Key=key, UploadId=made, PartNumber=number, Body=data)
            return {"ETag": sent["ETag"], "PartNumber": number}

        try:
            sent = list(ahead(send, range(1, -(-size // part) + 1), workers=self.parts))
            with suppress(AbsentError):  # completed by a call whose answer was lost; who reads it back will see
                parts = {"Parts": sent}
                self._call(patience, "complete_multipart_upload", Key=key, UploadId=made, MultipartUpload=parts)
        except BaseException:
            with suppress(AbsentError, PassingError, StorageError):
                self._once("abort_multipart_upload", Key=key, UploadId=made)
            raise

    def remove(self, patience: Patience, names: Sequence[str]) -> None:
        """Remove objects; one that is not there counts as removed."""
        for start in range(0, len(names), REMOVED_AT_ONCE):
            keys = [{"Key": self.prefix + name} for name in names[start : start + REMOVED_AT_ONCE]]
            done = self._call(patience, "delete_objects", Delete={"Objects": keys, "Quiet": True})
            for error in done.get("Errors", ()):
                raise StorageError(f"{self.url}/{error['Key'].removeprefix(self.prefix)}: not removed: {error['Code']}")

    def abort_unfinished(self, patience: Patience, wanted: Callable[[str], object]) -> int:
        """Drop uploads in parts that nobody completed, of names that are `wanted`; how many there were."""
        count, asked = 0, {"Prefix": self.prefix}
        while True:
            page = self._call(patience, "list_multipart_uploads", **asked)
            for one in page.get("Uploads", ()):
                if wanted(one["Key"].removeprefix(self.prefix)):
                    with suppress(AbsentError):
                        self._call(patience, "abort_multipart_upload", Key=one["Key"], UploadId=one["UploadId"])
                    count += 1
            if not page.get("IsTruncated"):
                return count
            asked |= {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def check_writable(self, patience: Patience, name: str) -> None:
        """Raise what writing would, without leaving an object: an upload in parts is begun and dropped."""
        key = self.prefix + name
        made = self._call(patience, "create_multipart_upload", Key=key)["UploadId"]
        with suppress(AbsentError):
            self._call(patience, "abort_multipart_upload", Key=key, UploadId=made)

    def _span(self, patience: Patience, name: str, start: int, stop: int) -> bytes:
        path = f"{self.bucket}/{self.prefix}{name}"

        def read() -> bytes:
            data = self._understood(lambda store: store._cat_file(path, start=start, end=stop))
            if len(data) != stop - start:
                raise PassingError(f"{len(data):,} bytes came of {stop - start:,}")
            return data

        return self._patient(patience, read)

    def _call(self, patience: Patience, method: str, **asked: Any) -> dict[str, Any]:
        return self._patient(patience, lambda: self._once(method, **asked))

    def _once(self, method: str, **asked: Any) -> dict[str, Any]:
        return self._understood(
            lambda store: store._call_s3(method, Bucket=self.bucket, **asked), size=len(asked.get("Body", b""))
        )

    def _patient(self, patience: Patience, function: Callable[[], T]) -> T:
        try:
            return patience.call(function)
        except GivenUpError as error:
            raise StorageError(f"{patience.what}: {error}; check the network and the store") from error

    def _understood(self, request: Callable[[Any], Awaitable[T]], *, size: int = 0) -> T:
        """What a request gives, in time; `size` bytes go with it."""
        from fsspec.asyn import sync

        store, seconds = self._store, WHOLE * self.seconds * max(1.0, size / PART)

        async def in_time() -> T:
            return await asyncio.wait_for(request(store), seconds)

        try:
            return sync(store.loop, in_time)
        except Exception as error:
            if code_of(error) in RENEWS:
                self._store = self._connected()
            raise understood(error, self.url) from error

    def _connected(self) -> Any:
        try:
            from s3fs import S3FileSystem
        except ImportError as error:
            problem = f's3fs, which {self.url} needs, is not installed; pip install "pentode[s3]" adds it'
            raise ConfigError([problem]) from error

        store = S3FileSystem(
            skip_instance_cache=True,
            use_listings_cache=False,
            config_kwargs={
                "retries": {"max_attempts": 0},
                "connect_timeout": min(10.0, self.seconds),
                "read_timeout": self.seconds,
                "max_pool_connections": CONNECTIONS,
                "request_checksum_calculation": "when_required",  # stores other than AWS do not know the newer ones
                "response_checksum_validation": "when_required",
            },
        )
        store.retries = 1
        return store
