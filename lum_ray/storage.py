"""Where a URI points: a local path, or an S3 store by the standard variables; the same access for all three clients.

pyarrow reads and writes, s3fs does the conditional put (pyarrow has none), deltalake opens tables. Their time-outs and
retries come from here, so that a store that is away for some seconds stops nobody and one that stays away is named.

pyarrow's *default* retry strategy, not the *standard* one: that has a quota of retries which pyarrow never fills up
again, so that a long job ends up without any.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

from pyarrow import fs

T = TypeVar("T")

RETRY_S = "LUM_RAY_S3_RETRY_S"
"""The variable for how long a request to a store that does not answer is tried again."""
DEFAULT_RETRY_S = 60.0
CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 30.0
"""Without a single byte."""


class UserError(ValueError):
    """Something that the user can mend: the message says what was expected, what came, where, and what to do."""


class MachineError(UserError):
    """What a machine, a cluster or a store lacks, and not what the run asks for: mended, the same call goes on."""


@dataclass(frozen=True)
class S3:
    """An S3 store as the environment describes it. Without keys, each client looks where it is used to (profile, role).

    Raises UserError for an endpoint that is no URL and a retry time that is no number.
    """

    endpoint: str | None
    region: str
    access_key: str | None = field(repr=False)
    secret_key: str | None = field(repr=False)
    session_token: str | None = field(repr=False)
    ca_file: str | None
    retry_s: float

    @staticmethod
    def of_environment() -> S3:
        get = os.environ.get
        endpoint = get("AWS_ENDPOINT_URL_S3") or get("AWS_ENDPOINT_URL")
        if endpoint and not endpoint.startswith(("http://", "https://")):
            raise MachineError(f"AWS_ENDPOINT_URL: expected http://host:port or https://host:port, got '{endpoint}'")
        retry = get(RETRY_S) or DEFAULT_RETRY_S
        try:
            retry_s = float(retry)
        except ValueError:
            raise MachineError(f"{RETRY_S}: expected seconds such as 60, got '{retry}'") from None
        region = get("AWS_REGION") or get("AWS_DEFAULT_REGION") or "us-east-1"
        return S3(
            endpoint=endpoint.rstrip("/") if endpoint else None,
            region=region,
            access_key=get("AWS_ACCESS_KEY_ID") or None,
            secret_key=get("AWS_SECRET_ACCESS_KEY") or None,
            session_token=get("AWS_SESSION_TOKEN") or None,
            ca_file=get("AWS_CA_BUNDLE") or None,
            retry_s=retry_s,
        )

    @property
    def name(self) -> str:
        return self.endpoint or f"Amazon S3 ({self.region})"

    @property
    def fsspec_options(self) -> dict[str, Any]:
        """Arguments of `s3fs.S3FileSystem`."""
        return {
            "key": self.access_key,
            "secret": self.secret_key,
            "token": self.session_token,
            "endpoint_url": self.endpoint,
            "client_kwargs": {"region_name": self.region, **({"verify": self.ca_file} if self.ca_file else {})},
            "config_kwargs": {"connect_timeout": CONNECT_TIMEOUT_S, "read_timeout": REQUEST_TIMEOUT_S},
            "use_listings_cache": False,
        }

    @property
    def delta_options(self) -> dict[str, str]:
        """`storage_options` of deltalake."""
        if self.ca_file:
            # it has no option for this, and reads this variable when it connects
            os.environ.setdefault("SSL_CERT_FILE", self.ca_file)
        given = {
            "aws_access_key_id": self.access_key,
            "aws_secret_access_key": self.secret_key,
            "aws_session_token": self.session_token,
            "aws_endpoint_url": self.endpoint,
        }
        return {name: value for name, value in given.items() if value} | {
            "aws_region": self.region,
            "allow_http": "true" if (self.endpoint or "").startswith("http://") else "false",
            "connect_timeout": f"{CONNECT_TIMEOUT_S:g}s",
            "timeout": f"{REQUEST_TIMEOUT_S:g}s",
            "max_retries": "1000",  # the time is what bounds them
            "retry_timeout": f"{self.retry_s:g}s",
            "backoff_config.init_backoff": "100ms",
            "backoff_config.max_backoff": "5s",
        }


@dataclass(frozen=True)
class Storage:
    """Where a URI points: the pyarrow filesystem, the path on it, and for S3 the store."""

    filesystem: fs.FileSystem
    path: str
    s3: S3 | None = None

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, fs.LocalFileSystem)

    @property
    def options(self) -> Mapping[str, str]:
        """deltalake's `storage_options`."""
        return self.s3.delta_options if self.s3 else {}


def storage(uri: str) -> Storage:
    """The filesystem behind `uri` (a local path, `file://...` or `s3://bucket/...`).

    S3 takes the standard variables: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION,
    AWS_CA_BUNDLE for a certificate authority of one's own and, for other stores than Amazon's, AWS_ENDPOINT_URL. The
    first use of a bucket in a process looks whether it is there. Raises UserError for any other scheme, a store that
    does not answer (after `LUM_RAY_S3_RETRY_S`, 60 s), keys that it refuses, and a bucket that is not there.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme == "file":
        return Storage(fs.LocalFileSystem(), os.path.abspath(rest if separator else uri))
    if scheme != "s3":
        raise UserError(f"{uri}: expected a local path or s3://bucket/path, got the scheme '{scheme}'")
    path = rest.strip("/")
    if not path:
        raise UserError(f"{uri}: expected s3://bucket/path, got no bucket")
    store = S3.of_environment()
    _reach(store, path)
    return Storage(_filesystem(store), path, store)


@lru_cache(maxsize=16)
def _filesystem(store: S3) -> fs.S3FileSystem:
    # the strategy waits 25 ms * 2^n before try n, so this many tries take up to `retry_s`
    tries = int(math.log2(max(store.retry_s, 0.05) / 0.025 + 2))
    keywords: dict[str, Any] = {}
    if store.endpoint:
        keywords["scheme"], _, keywords["endpoint_override"] = store.endpoint.partition("://")
    return fs.S3FileSystem(
        access_key=store.access_key,
        secret_key=store.secret_key,
        session_token=store.session_token,
        region=store.region,
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=REQUEST_TIMEOUT_S,
        retry_strategy=fs.AwsDefaultS3RetryStrategy(max_attempts=tries),
        allow_delayed_open=True,  # a small file is one request instead of three
        tls_ca_file_path=store.ca_file,
        **keywords,
    )


_found: set[tuple[S3, str]] = set()


def _reach(store: S3, path: str) -> None:
    """Look once a process and bucket whether it is there. Raises UserError."""
    bucket = path.partition("/")[0]
    if (store, bucket) in _found:
        return
    filesystem = _filesystem(store)
    with reaching(f"s3://{path}"):
        missing = filesystem.get_file_info(path).type == fs.FileType.NotFound
    if missing and path != bucket:
        # keys for some prefix only may not ask this
        with contextlib.suppress(OSError):
            missing = filesystem.get_file_info(bucket).type == fs.FileType.NotFound
    if missing:
        raise MachineError(
            f"s3://{bucket}: expected a bucket, {store.name} has none of that name; make it, or correct the name or "
            "AWS_ENDPOINT_URL"
        )
    _found.add((store, bucket))


@contextlib.contextmanager
def reaching(uri: str) -> Iterator[None]:
    """Turns what the user can mend into a MachineError: a store that does not answer or refuses, and a full disk."""
    started_at = time.monotonic()
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        problem = _problem(uri, error, time.monotonic() - started_at)
        if problem is None:
            raise
        raise MachineError(problem) from error


def reach(uri: str, act: Callable[[], T]) -> T:
    """What `act()` gives; done again for a while where an answer could not be read. Raises as `reaching`.

    Of a short range pyarrow holds room for just those bytes: an error's longer answer does not fit, and so is not tried
    again by its own strategy.
    """
    started_at, pause_s = time.monotonic(), 0.1
    while True:
        try:
            with reaching(uri):
                return act()
        except UserError as error:
            reason = str(error.__cause__ or error.__context__)
            if UNREADABLE_ANSWER not in reason or time.monotonic() - started_at > S3.of_environment().retry_s:
                raise
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 5.0)


UNREADABLE_ANSWER = "Failed to flush response stream"
REFUSALS = (
    "ACCESS_DENIED",
    "INVALID_ACCESS_KEY_ID",
    "SIGNATURE_DOES_NOT_MATCH",
    "EXPIRED",
    "INVALID_TOKEN",
    "HTTP status 403",
)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _problem(uri: str, error: OSError, seconds: float) -> str | None:
    text = " ".join(str(error).split())[:300]
    if error.errno in FULL:
        return f"{uri}: cannot write: {os.strerror(error.errno)} ({_free(uri)}); make space, then run the same again"
    if "AWS Error" not in text:
        return None
    store = S3.of_environment()
    if any(refusal in text for refusal in REFUSALS):
        who = f"the key '{store.access_key}'" if store.access_key else "no AWS_ACCESS_KEY_ID set"
        return (
            f"{uri}: {store.name} refuses access ({who}): {text}; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and "
            "AWS_SESSION_TOKEN, and that they may list, read, write and delete there"
        )
    return (
        f"{uri}: no good answer from {store.name} in {seconds:.0f} s of trying: {text}; check that it runs and "
        f"AWS_ENDPOINT_URL; {RETRY_S} is how long it is tried (now {store.retry_s:g} s)"
    )


def _free(uri: str) -> str:
    """What is left on the disk of a local path; for S3 on that of temporary files, the only one that is written to."""
    place = tempfile.gettempdir() if uri.startswith("s3://") else os.path.abspath(uri.removeprefix("file://"))
    while not os.path.isdir(place):
        place = os.path.dirname(place)
    return f"{shutil.disk_usage(place).free / 2**20:,.0f} MiB free on the disk of {place}"
