"""What the S3 client raises, told apart: it may pass, the object is not there, or a person has to act."""

import asyncio
from typing import Any

from pentode.checkpoint.retry import PassingError
from pentode.errors import StorageError

PASSING = {  # beside all answers from 500 on, and 429
    "BadDigest",
    "ExpiredToken",  # a new session asks the provider again
    "ExpiredTokenException",
    "IncompleteBody",
    "OperationAborted",
    "RequestTimeout",
    "SlowDown",
    "Throttling",
    "TokenRefreshRequired",
    "XAmzContentSHA256Mismatch",
}
RENEWS = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"}
ABSENT = {"404", "416", "InvalidRange", "NoSuchKey", "NoSuchUpload", "NotFound"}
NEEDED = "ListBucket, GetObject, PutObject, DeleteObject, AbortMultipartUpload and ListBucketMultipartUploads"
WITHOUT_KEYS = (
    "there are no usable credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or a role"
)


class AbsentError(Exception):
    """There is no such object, or no such unfinished upload."""


def understood(error: Exception, url: str) -> Exception:
    """PassingError, AbsentError or StorageError for what a call about `url` raised; bugs are returned as they are."""
    response = _response(error)
    if response is None:
        return _without_answer(error, url)
    code, status = code_of(error), response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    said = f"{code} ({status})" if code != str(status) else str(status)
    if code in PASSING or status == 429 or (status >= 500 and status != 501):
        return PassingError(f"the store answers {said}")
    if code in ABSENT:
        return AbsentError(url)
    if code == "NoSuchBucket":
        return StorageError(f"{url}: there is no such bucket; make it, or mend the address")
    if status in (401, 403) or code in ("AccessDenied", "InvalidToken"):
        return StorageError(f"{url}: access is refused, {said}; the credentials need {NEEDED}")
    return StorageError(
        f"{url}: the store refuses, {said}: {response.get('Error', {}).get('Message', '')}".rstrip(": ")
    )


def code_of(error: Exception) -> str:
    """The store's word for what is wrong, "SlowDown"; "" where it did not answer."""
    response = _response(error)
    return "" if response is None else str(response.get("Error", {}).get("Code", ""))


def _response(error: Exception) -> dict[str, Any] | None:
    """The store's answer, which s3fs hides behind an OSError."""
    for one in (error, error.__cause__):
        found = getattr(one, "response", None)
        if isinstance(found, dict):
            return found
    return None


def _without_answer(error: Exception, url: str) -> Exception:
    from aiohttp import ClientError
    from botocore import exceptions as boto

    if isinstance(error, (boto.HTTPClientError, boto.IncompleteReadError, boto.ResponseStreamingError)):
        return PassingError(f"the connection fails ({type(error).__name__})")
    if isinstance(error, boto.NoRegionError):
        return StorageError(f"{url}: no region is set; set AWS_DEFAULT_REGION")
    credentials = (
        boto.NoCredentialsError,
        boto.PartialCredentialsError,
        boto.CredentialRetrievalError,
        boto.ProfileNotFound,
        boto.TokenRetrievalError,
        boto.SSOError,
    )
    if isinstance(error, credentials):
        return StorageError(f"{url}: {WITHOUT_KEYS} ({type(error).__name__})")
    if isinstance(error, FileNotFoundError):
        return AbsentError(url)
    if isinstance(error, (OSError, ClientError, asyncio.TimeoutError, EOFError)) or "Parser" in type(error).__name__:
        return PassingError(f"the connection fails ({type(error).__name__})")
    if isinstance(error, boto.BotoCoreError):
        return StorageError(f"{url}: {error}")
    return error
