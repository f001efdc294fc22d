"""From a line of configuration to a provider."""

import re
from typing import TYPE_CHECKING

from kvrelay_infra.providers.base import Pool
from kvrelay_protocol.errors import UsageError

if TYPE_CHECKING:
    from kvrelay_infra.providers.base import Provider

_ADDRESS = re.compile(r"(aws|kubernetes):([^/,\s]+)/([^/,\s]+),([^/,\s]+)")


def open_provider(address: str) -> "Provider":
    """`aws:CLUSTER/PREFILL,DECODE` or `kubernetes:NAMESPACE/PREFILL,DECODE`: services or Deployments.

    Credentials are found as boto3 and Kubernetes' client find them; the client libraries are imported
    only here.

    Raises:
        UsageError: `address` is neither.
        ProviderError: there are no credentials, or no region.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise UsageError(
            f"provider {address!r}: must be aws:CLUSTER/PREFILL,DECODE or "
            "kubernetes:NAMESPACE/PREFILL,DECODE"
        )
    platform, place, prefill, decode = match.groups()
    names = {Pool.PREFILL: prefill, Pool.DECODE: decode}
    if platform == "aws":
        from kvrelay_infra.providers.aws.provider import AwsProvider

        return AwsProvider.connect(cluster=place, services=names)
    from kvrelay_infra.providers.kubernetes import KubernetesProvider

    return KubernetesProvider.connect(namespace=place, deployments=names)
