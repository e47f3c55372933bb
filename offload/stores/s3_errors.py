"""What the errors of S3 and of its library mean: whether they may pass, and what to tell."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from botocore import exceptions as boto
from botocore.parsers import ResponseParserError

from offload.errors import (
    BusyError,
    ConfigError,
    IntegrityError,
    NotFoundError,
    OffloadError,
    PolicyError,
    PrivilegeError,
    UnavailableError,
)

NETWORK = (boto.HTTPClientError, boto.IncompleteReadError, ResponseParserError)
ERRORS = (boto.BotoCoreError, boto.ClientError, ResponseParserError)

# by their code, whatever their status is; BadDigest: bytes were damaged on the way
_PASSING = {
    "BadDigest", "BandwidthLimitExceeded", "IncompleteBody", "InternalError", "OperationAborted",
    "RequestLimitExceeded", "RequestTimeout", "ServiceUnavailable", "SlowDown", "Throttling",
    "ThrottlingException", "TooManyRequests", "TooManyRequestsException",
}  # fmt: skip
_PASSING_STATUS = {408, 429, 500, 502, 503, 504}
_TLS_FOR_GOOD = ("CERTIFICATE", "WRONG_VERSION_NUMBER", "HANDSHAKE_FAILURE", "UNSUPPORTED_PROTOCOL")
_CREDENTIALS = {
    "InvalidAccessKeyId": "the access key is not known there",
    "SignatureDoesNotMatch": "the secret key does not fit the access key",
    "ExpiredToken": "the credentials have expired",
    "ExpiredTokenException": "the credentials have expired",
    "RequestExpired": "the credentials have expired",
    "TokenRefreshRequired": "the credentials have expired",
    "InvalidToken": "the session token is not valid",
    "InvalidClientTokenId": "the access key is not known there",
}
_HOW_TO_SIGN = "give valid keys: profile or credentials_file of the store, or the environment"
_NO_LOCK = {"InvalidRequest", "ObjectLockConfigurationNotFoundError"}


def code_of(error: BaseException | None) -> str:
    """S3's own code of an error; its HTTP status where the answer had no body; else nothing."""
    if not isinstance(error, boto.ClientError):
        return ""
    return str(error.response.get("Error", {}).get("Code", ""))


def status_of(error: BaseException) -> int:
    """The HTTP status; 0 where there was no answer."""
    if not isinstance(error, boto.ClientError):
        return 0
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, boto.ClientError):
        return code_of(error) in _PASSING or status_of(error) in _PASSING_STATUS
    if isinstance(error, boto.SSLError):
        return not any(word in str(error).upper() for word in _TLS_FOR_GOOD)
    return isinstance(error, NETWORK)


def is_missing(error: BaseException) -> bool:
    """Whether an object (not its bucket) is not there."""
    return code_of(error) in ("NoSuchKey", "404", "NoSuchVersion")


def explain(error: Exception, url: str, name: str) -> OffloadError:
    """The error that the user sees. No key is in it; S3's own words may be."""
    if isinstance(error, boto.ClientError):
        return _answered(error, url, name)
    return _unanswered(error, url)


def _answered(error: boto.ClientError, url: str, name: str) -> OffloadError:
    code = code_of(error)
    if is_missing(error):
        return NotFoundError(f"no object {name} in {url}", code="no-object")
    if code == "NoSuchBucket":
        return UnavailableError(
            f"the bucket of the store {url} does not exist",
            code="no-bucket",
            hint="make it, or correct bucket and endpoint: offload makes no buckets",
        )
    if code in ("PreconditionFailed", "ConditionalRequestConflict"):
        return BusyError(f"object {name} exists already in {url}", code="object-exists")
    if code in ("InvalidRange", "416"):
        return IntegrityError(f"object {name} of {url} ends too early", code="object-short")
    if code == "RequestTimeTooSkewed":
        return _skewed(error, url)
    if code in _CREDENTIALS:
        return UnavailableError(
            f"the store {url} refuses its credentials: {_CREDENTIALS[code]}",
            code="store-credentials",
            hint=_HOW_TO_SIGN,
        )
    if code in ("AccessDenied", "AllAccessDisabled", "403"):
        return PrivilegeError(
            f"the store {url} denies {error.operation_name} of {name or 'its bucket'} to these "
            "credentials",
            code="store-denied",
            hint="if they should be allowed to: see the bucket's policy, docs/howto/s3.md",
        )
    return _unusual(error, code, url, name)


def _unusual(error: boto.ClientError, code: str, url: str, name: str) -> OffloadError:
    said = str(error.response.get("Error", {}).get("Message") or "") or code
    if code in ("PermanentRedirect", "AuthorizationHeaderMalformed", "301", "IllegalLocation"):
        return ConfigError(
            f"the bucket of the store {url} is in another region: {said}",
            code="store-region",
            hint="set region of the store to the bucket's",
        )
    if code == "InvalidStorageClass":
        return ConfigError(
            f"the store {url} has no such storage class: {said}",
            code="store-option",
            hint="correct storage_class of the store",
        )
    if code == "InvalidObjectState":
        return UnavailableError(
            f"object {name} of {url} lies in an archive class and must be brought back first",
            code="store-archived",
            hint="restore it to a storage class that can be read at once",
        )
    if code in _NO_LOCK and "lock" in said.lower():
        return no_object_lock(url)
    if code == "QuotaExceeded":
        return UnavailableError(f"the quota of the store {url} is used up", code="no-space")
    return UnavailableError(
        f"the store {url} fails at {error.operation_name} of {name or 'its bucket'}: "
        f"{said} (HTTP {status_of(error)})",
        code="store-unavailable",
    )


def no_object_lock(url: str) -> OffloadError:
    """Servers do not agree on how they say it; some say nothing but that the request is wrong."""
    return PolicyError(
        f"the bucket of the store {url} has no object lock",
        code="no-object-lock",
        hint="object lock is chosen when a bucket is made; make another one",
    )


def _skewed(error: boto.ClientError, url: str) -> OffloadError:
    ours = datetime.now(UTC)
    theirs = server_time(error.response.get("ResponseMetadata", {}))
    clocks = f"here it is {ours:%Y-%m-%d %H:%M:%S}Z"
    if theirs is not None:
        clocks += f", there {theirs:%Y-%m-%d %H:%M:%S}Z"
    return UnavailableError(
        f"the store {url} refuses requests because of the time: {clocks}",
        code="store-clock",
        hint="set the clock of this machine, e.g. with timedatectl set-ntp true",
    )


def server_time(metadata: Mapping[str, Any]) -> datetime | None:
    """The `Date` of an answer, to the second; None where it says none."""
    text = metadata.get("HTTPHeaders", {}).get("date")
    return parsedate_to_datetime(text).astimezone(UTC) if text else None


def _unanswered(error: Exception, url: str) -> OffloadError:
    if isinstance(error, (boto.NoCredentialsError, boto.PartialCredentialsError)):
        return UnavailableError(
            f"there are no credentials for the store {url}",
            code="store-credentials",
            hint=_HOW_TO_SIGN,
        )
    if isinstance(error, (boto.CredentialRetrievalError, boto.TokenRetrievalError)):
        return UnavailableError(
            f"the credentials for the store {url} cannot be had: {error}",
            code="store-credentials",
            hint=_HOW_TO_SIGN,
        )
    if isinstance(error, boto.ProfileNotFound):
        return ConfigError(
            f"the credentials of the store {url}: {error}",
            code="store-credentials",
            hint="correct profile or credentials_file of the store",
        )
    if isinstance(error, boto.SSLError):
        return UnavailableError(
            f"no trusted TLS connection to the store {url}: {_last_reason(error)}",
            code="store-tls",
            hint="set ca_file of the store to the authority of the server's certificate",
        )
    if isinstance(error, (boto.EndpointConnectionError, boto.ConnectTimeoutError)):
        return UnavailableError(
            f"the server of the store {url} cannot be reached: {_last_reason(error)}",
            code="store-unreachable",
            hint="check endpoint and network",
        )
    return UnavailableError(
        f"the store {url} does not answer as it should: {_last_reason(error)}",
        code="store-unavailable",
    )


def _last_reason(error: BaseException) -> str:
    """The library's own words, without the representation of its objects."""
    text = " ".join(str(error).split())
    return text.rpartition(">: ")[2] or text
