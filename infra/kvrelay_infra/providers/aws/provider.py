"""The desired count of two ECS services.

Instances are not set here: the services' capacity provider starts one when a task finds no place and
ends those that are empty. Where Application Auto Scaling has a service, its number is not ours.
"""

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Self

import boto3
from botocore.config import Config

from kvrelay_infra.providers.aws.errors import explained
from kvrelay_infra.providers.base import Pool, PoolStatus, checked
from kvrelay_protocol.errors import ProviderMissing, SecondWriter

if TYPE_CHECKING:
    from types_boto3_ecs.type_defs import ServiceTypeDef

_PATIENCE = Config(
    connect_timeout=3, read_timeout=10, retries={"mode": "standard", "max_attempts": 4}
)
_TROUBLE = ("unable to", "failed", "insufficient", "error", "unhealthy")


class AwsProvider:
    """Two services of one ECS cluster. boto3's clients are shared by threads, as they may be."""

    def __init__(
        self, session: boto3.Session, *, cluster: str, services: Mapping[Pool, str]
    ) -> None:
        self._ecs = session.client("ecs", config=_PATIENCE)
        self._scaling = session.client("application-autoscaling", config=_PATIENCE)
        self._cluster = cluster
        self._services = dict(services)

    @classmethod
    def connect(
        cls, *, cluster: str, services: Mapping[Pool, str], region: str | None = None
    ) -> Self:
        """With boto3's own search for credentials and, unless given, for the region.

        Raises:
            ProviderDenied: the profile does not exist.
            ProviderUnreachable: no region is set.
        """
        with explained(f"cluster {cluster}"):
            return cls(boto3.Session(region_name=region), cluster=cluster, services=services)

    async def scale(self, pool: Pool, replicas: int) -> None:
        """See `Provider.scale`."""
        await asyncio.to_thread(self._scale, self._services[pool], checked(replicas))

    async def describe(self) -> Mapping[Pool, PoolStatus]:
        """See `Provider.describe`; `reason` is the service's latest event that tells of trouble."""
        return await asyncio.to_thread(self._describe)

    async def close(self) -> None:
        """See `Provider.close`."""
        self._ecs.close()
        self._scaling.close()

    def _scale(self, service: str, replicas: int) -> None:
        with explained(f"service {service} in cluster {self._cluster}"):
            self._refuse_second_writer(service, replicas)
            if self._read([service])[service]["desiredCount"] != replicas:
                self._ecs.update_service(
                    cluster=self._cluster, service=service, desiredCount=replicas
                )

    def _refuse_second_writer(self, service: str, replicas: int) -> None:
        found = self._scaling.describe_scalable_targets(
            ServiceNamespace="ecs",
            ResourceIds=[f"service/{self._cluster}/{service}"],
            ScalableDimension="ecs:service:DesiredCount",
        )
        if found["ScalableTargets"]:
            raise SecondWriter(
                f"aws: service {service} in cluster {self._cluster}: not scaled to {replicas}, because "
                f"Application Auto Scaling sets its desired count; deregister that scalable target"
            )

    def _describe(self) -> dict[Pool, PoolStatus]:
        with explained(f"cluster {self._cluster}"):
            found = self._read(list(self._services.values()))
        return {pool: _status(found[name]) for pool, name in self._services.items()}

    def _read(self, names: list[str]) -> dict[str, "ServiceTypeDef"]:
        answer = self._ecs.describe_services(cluster=self._cluster, services=names)
        found = {
            service["serviceName"]: service
            for service in answer["services"]
            if service["status"] == "ACTIVE"
        }
        missing = [name for name in names if name not in found]
        if missing:
            raise ProviderMissing(
                f"aws: cluster {self._cluster} has no active service {', '.join(missing)}; "
                f"`kvrelay deploy aws apply` makes them"
            )
        return found


def _status(service: "ServiceTypeDef") -> PoolStatus:
    desired, running = service["desiredCount"], service["runningCount"]
    pending = max(desired - running, 0)
    return PoolStatus(desired, running, pending, _trouble(service) if pending else "")


def _trouble(service: "ServiceTypeDef") -> str:
    """ECS lists events newest first."""
    for event in service.get("events", []):
        message = event["message"].removeprefix(f"(service {service['serviceName']}) ")
        if any(word in message.lower() for word in _TROUBLE):
            return message
    return ""
