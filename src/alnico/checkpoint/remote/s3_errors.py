"""What botocore's errors mean: try again, a refusal that the caller may expect, or a message for the user."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from alnico.checkpoint.network import (
    BUSY,
    TIMEOUT,
    TIMEOUT_SECONDS,
    TransferStopped,
    read_seconds,
    requested_pause,
)
from alnico.checkpoint.remote.retries import Again
from alnico.errors import AlnicoError, HubError

NOT_THERE = ("NoSuchKey", "NotFound", "404")
NO_BUCKET = ("NoSuchBucket", "InvalidBucketName")
NO_UPLOAD = ("NoSuchUpload", "NotFound", "404")
CHANGED = ("PreconditionFailed", "412", "InvalidRange", "416")
TAKEN = ("PreconditionFailed", "412")
EXPIRED = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired")
NOT_ACCEPTED = (
    "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "InvalidSecurity", "MissingSecurityHeader",
    "CredentialsNotSupported", "InvalidClientTokenId",
)  # fmt: skip
DENIED = ("AccessDenied", "AllAccessDisabled", "AccountProblem", "Forbidden", "Unauthorized", "401", "403")
ELSEWHERE = ("PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301", "307")  # fmt: skip
MAY_PASS = (
    "SlowDown", "Throttling", "ThrottlingException", "RequestThrottled", "TooManyRequests", "RequestLimitExceeded",
    "BandwidthLimitExceeded", "RequestTimeout", "InternalError", "ServiceUnavailable", "OperationAborted",
    "ConditionalRequestConflict",
)  # fmt: skip
CODE = re.compile(r"[A-Za-z0-9.]{1,60}")

CREDENTIALS = (
    "Check AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN), and that AWS_ENDPOINT_URL is the "
    "server that they are for."
)


class Refused(Exception):
    """A server's answer that is an error, with its code and its status."""

    def __init__(self, code: str, status: int) -> None:
        super().__init__(code)
        self.code, self.status = code, status


@contextmanager
def s3_errors(where: str, endpoint: str, *, has_answered: bool) -> Iterator[None]:
    """Turn errors of botocore and urllib3 into :class:`Refused`, :class:`Again` and HubError; others pass.

    ``has_answered`` says that the endpoint is one: only then a connection that is not made is tried again.
    Texts of the libraries and of the server are not shown: they may repeat credentials.
    """
    try:
        yield
    except (AlnicoError, Again, Refused, TransferStopped):
        raise
    except Exception as error:
        _raise_meaning(where, endpoint, error, has_answered)


def _raise_meaning(where: str, endpoint: str, error: Exception, has_answered: bool) -> NoReturn:
    from botocore import exceptions

    if isinstance(error, exceptions.ClientError):
        raise _answered(error.response) from None
    kinds = {kind.__name__ for kind in type(error).__mro__}
    modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    name = type(error).__name__
    if not modules & {"botocore", "urllib3"}:
        raise error
    if isinstance(error, exceptions.ProfileNotFound):
        profile = str(error.kwargs.get("profile", ""))[:80]
        raise HubError(
            f"{where}: AWS's files have no profile {profile!r}; expected one of those in ~/.aws/config. Check AWS_PROFILE."
        ) from None
    if kinds & {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "SSOError", "TokenRetrievalError", "LoginError", "MetadataRetrievalError", "RefreshWithMFAUnsupportedError", "UnknownCredentialError", "ConfigParseError", "InvalidConfigError", "NoAuthTokenError"}:  # fmt: skip
        raise HubError(
            f"{where}: the credentials cannot be used ({name}). Log in again (`aws sso login`), or correct them. {CREDENTIALS} "
            "The same command resumes."
        ) from None
    if has_answered and kinds & {
        "EndpointConnectionError",
        "ConnectTimeoutError",
        "SSLError",
        "ProxyConnectionError",
    }:
        raise Again(f"does not answer ({name})") from None
    if kinds & {"SSLError", "ProxyConnectionError", "InvalidProxiesConfigError"}:
        raise HubError(
            f"{where}: no connection to {endpoint} can be made ({name}). Check AWS_ENDPOINT_URL, AWS_CA_BUNDLE and the proxies in the "
            "environment (HTTPS_PROXY, HTTP_PROXY)."
        ) from None
    if kinds & {"EndpointConnectionError", "ConnectTimeoutError"}:
        raise HubError(
            f"{where}: {endpoint} could not be reached ({name}). Check the connection, AWS_ENDPOINT_URL and AWS_REGION, and try "
            "again."
        ) from None
    if kinds & {"ReadTimeoutError"}:
        raise Again(f"sent nothing for {read_seconds(TIMEOUT, TIMEOUT_SECONDS):g} s") from None
    if kinds & {"HTTPClientError", "IncompleteReadError", "ResponseStreamingError", "HTTPError", "ChecksumError", "FlexibleChecksumError"}:  # fmt: skip
        raise Again(f"cut off the connection ({name})") from None
    if "ResponseParserError" in kinds:
        raise HubError(
            f"{where}: {endpoint} does not answer as S3 does ({name}). Check AWS_ENDPOINT_URL and the proxies in the environment."
        ) from None
    raise HubError(
        f"{where}: no request can be made with these settings ({name}). Check the URL, AWS_ENDPOINT_URL, AWS_REGION and "
        "AWS_PROFILE."
    ) from None


def _answered(response: Mapping[str, Any]) -> Exception:
    """Return what an answer with an error means."""
    about = response.get("ResponseMetadata", {})
    status = int(about.get("HTTPStatusCode", 0))
    code = str(response.get("Error", {}).get("Code", ""))
    code = code if CODE.fullmatch(code) else str(status)
    if code in MAY_PASS or (status in BUSY and code not in (*EXPIRED, *DENIED)):
        headers = {key.title(): value for key, value in about.get("HTTPHeaders", {}).items()}
        return Again(f"is busy (status {status}, {code})", requested_pause(headers))
    return Refused(code, status)


def refusal(
    where: str, refused: Refused, *, bucket: str, endpoint: str, rights: str, is_signed: bool
) -> HubError:
    """Return the error for an answer that nobody expected. ``rights`` are those that the request needs."""
    code = refused.code
    if code in EXPIRED:
        text = (
            f"the credentials have expired ({code}). Refresh them (`aws sso login`, or a new AWS_SESSION_TOKEN); the same command "
            "resumes."
        )
    elif code in NOT_ACCEPTED:
        text = f"{endpoint} does not accept the credentials ({code}). {CREDENTIALS}"
    elif code in NO_BUCKET:
        text = (
            f"{endpoint} has no bucket {bucket!r} ({code}). Check the URL, AWS_ENDPOINT_URL and AWS_PROFILE."
        )
    elif code == "RequestTimeTooSkewed":
        text = f"the clock of this machine differs from that of {endpoint} ({code}). Set the clock."
    elif code in ELSEWHERE:
        text = f"the bucket {bucket!r} is in another region ({code}). Set AWS_REGION to the bucket's."
    elif code in DENIED and not is_signed:
        text = f"{endpoint} denies access without credentials ({code}); none were found. {CREDENTIALS}"
    elif code in DENIED:
        text = (
            f"{endpoint} denies access ({code}); expected the right {rights} in the bucket {bucket!r}. Ask its owner for it, or "
            "choose other credentials with AWS_PROFILE."
        )
    else:
        text = (
            f"{endpoint} refuses the request ({code if code == str(refused.status) else f'{code}, status {refused.status}'}). Check the URL and AWS_ENDPOINT_URL, and try again "
            "later."
        )
    return HubError(f"{where}: {text}")
