"""What botocore raises, as one line of ours."""

import contextlib
from collections.abc import Iterator

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
)

from kvrelay_protocol.errors import (
    ProviderDenied,
    ProviderError,
    ProviderMissing,
    ProviderQuota,
    ProviderUnreachable,
)

_DENIED = ("AccessDenied", "UnauthorizedOperation", "UnrecognizedClient", "ExpiredToken",
           "InvalidClientTokenId", "SignatureDoesNotMatch", "AuthFailure", "403")  # fmt: skip
_MISSING = ("NotFound", "NoSuch", "NotActive", "404")
_QUOTA = ("LimitExceeded", "QuotaExceeded", "TooManyBuckets", "InsufficientCapacity")
_LATER = ("Throttling", "ThrottlingException", "RequestLimitExceeded", "ServerException",
          "ServiceUnavailable", "InternalFailure", "InternalError")  # fmt: skip
_LOGIN = "set AWS_PROFILE or AWS_ACCESS_KEY_ID, or run it where a role is attached"


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns what botocore raises inside the block into a `ProviderError` about `what`."""
    try:
        yield
    except ClientError as error:
        raise _refused(what, error) from error
    except (NoCredentialsError, PartialCredentialsError, ProfileNotFound) as error:
        raise ProviderDenied(f"aws: {what}: {error}; {_LOGIN}") from error
    except BotoCoreError as error:
        raise ProviderUnreachable(f"aws: {what}: {' '.join(str(error).split())}") from error


def code_of(error: ClientError) -> str:
    return error.response.get("Error", {}).get("Code", "")


def _refused(what: str, error: ClientError) -> ProviderError:
    code = code_of(error)
    said = " ".join(error.response.get("Error", {}).get("Message", "").split())
    line = f"aws: {what}: {error.operation_name} answered {code}: {said}"
    if any(word in code for word in _DENIED):
        return ProviderDenied(line)
    if code in _LATER:
        return ProviderUnreachable(line)
    if any(word in code for word in _QUOTA):
        return ProviderQuota(f"{line}; raise it in Service Quotas or ask for less")
    if any(word in code for word in _MISSING):
        return ProviderMissing(line)
    return ProviderError(line)
