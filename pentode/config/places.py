"""Addresses in an object store, s3://bucket/prefix: taken apart, and what is wrong with one that a user wrote."""

import re

from pentode.config.validate import shown

BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{1,254}")  # names, and the ARNs of access points without a slash
PREFIX = re.compile(r"[^\x00-\x1f\x7f*?#%\\]{1,700}")  # of the 1024 bytes of a key; none that tools read as patterns


def bucket_and_prefix(url: str) -> tuple[str, str]:
    """("bucket", "a/b") of s3://bucket/a/b/; the prefix is "" where there is none."""
    bucket, _, prefix = url[len("s3://") :].partition("/")
    return bucket, prefix.strip("/")


def problem_of(url: str) -> str | None:
    """What is wrong with an address, and what to write instead; None where it is right."""
    should_be = "write s3://bucket/prefix"
    if not url.startswith("s3://"):
        return f"{shown(url)} is no address in an object store; {should_be}"
    bucket, prefix = bucket_and_prefix(url)
    if "@" in url or "?" in url:
        return "it holds credentials or options, which come from the environment alone; write s3://bucket/prefix"
    if not BUCKET.fullmatch(bucket):
        return f"{shown(url)} names no bucket; {should_be}"
    parts = prefix.split("/") if prefix else []
    if any(part in ("", ".", "..") for part in parts) or (prefix and not PREFIX.fullmatch(prefix)):
        return f"{shown(url)}: its prefix has an empty part, a dot or a character that has other uses; {should_be}"
    return None
