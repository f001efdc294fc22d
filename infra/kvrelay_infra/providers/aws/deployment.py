"""`kvrelay deploy aws`: a model bucket, a stack, and the services' numbers.

Each step looks before it acts, so `apply` and `destroy` go on where a crash has stopped them.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import boto3
from botocore.exceptions import ClientError

from kvrelay_infra.providers.aws.errors import code_of, explained
from kvrelay_infra.providers.aws.plan import template
from kvrelay_infra.providers.aws.settings import (
    MODEL_PREFIX,
    TAG,
    DeploySettings,
    model_bucket,
    service_names,
)
from kvrelay_infra.providers.aws.stack import Stack
from kvrelay_infra.providers.base import Pool
from kvrelay_protocol.errors import ProviderMissing

if TYPE_CHECKING:
    from types_boto3_ecs.type_defs import ServiceTypeDef

_ABSENT = ("ClusterNotFoundException", "ServiceNotFoundException", "ServiceNotActiveException")
_NO_BUCKET = ("404", "NoSuchBucket")


@dataclass(frozen=True, slots=True)
class ServiceLine:
    """One ECS service, in tasks."""

    name: str
    desired: int
    running: int
    latest_event: str


@dataclass(frozen=True, slots=True)
class DeploymentStatus:
    """What AWS says of a deployment; `state` is None where there is none."""

    state: str | None
    url: str
    api_key_secret: str
    log_group: str
    services: tuple[ServiceLine, ...]


class Deployment:
    """One deployment, by the name of its stack, in the session's region."""

    def __init__(
        self,
        session: boto3.Session,
        name: str,
        *,
        say: Callable[[str], None] = print,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._name = name
        self._say = say
        with explained(f"deployment {name}"):
            self._region = session.region_name
            self._s3 = session.client("s3")
            self._sts = session.client("sts")
            self._ecs = session.client("ecs")
            self._machines = session.client("autoscaling")
            self._stack = Stack(session, name, say=say, sleep=sleep)

    def apply(self, settings: DeploySettings) -> None:
        """Make what is missing and change what differs; the pools keep the workers they have.

        Raises:
            ProviderMissing: no model lies there yet; nothing but its bucket has been made.
            ProviderError: AWS refused something.
        """
        if settings.model_uri:
            bucket, _, prefix = settings.model_uri.removeprefix("s3://").partition("/")
        else:
            bucket, prefix = self._bucket(), MODEL_PREFIX
            self._ensure_bucket(bucket)
        self._require_model(bucket, prefix)
        there = self._desired()
        desired = {
            pool: min(max(there[pool], size.least), size.most)
            for pool, size in settings.pools.items()
        }
        self._stack.ensure(template(), settings.parameters(desired, bucket))

    def status(self) -> DeploymentStatus:
        """What is there now."""
        state, outputs = self._stack.status(), self._stack.outputs() or {}
        names = [f"{self._name}-router", *service_names(self._name).values()]
        return DeploymentStatus(
            state=state,
            url=outputs.get("Url", ""),
            api_key_secret=outputs.get("ApiKeySecret", ""),
            log_group=outputs.get("LogGroup", ""),
            services=tuple(_line(service) for service in self._services(names)),
        )

    def destroy(self, *, delete_models: bool = False) -> list[str]:
        """Remove everything; returns what is kept, one line each.

        Args:
            delete_models: empty and delete the model bucket too, if `apply` made one.
        """
        self._empty_pools()
        self._release_machines()
        self._say(f"deleting stack {self._name}; this takes some minutes")
        self._stack.delete()
        bucket = self._bucket()
        if not self._bucket_exists(bucket):
            return []
        if not delete_models:
            return [f"s3://{bucket} with the model's files (--delete-models removes it)"]
        self._delete_bucket(bucket)
        return []

    # --- pools ------------------------------------------------------------------------------------

    def _desired(self) -> dict[Pool, int]:
        """What the services have now; 0 before there are any."""
        names = service_names(self._name)
        found = {
            service["serviceName"]: service["desiredCount"]
            for service in self._services(list(names.values()))
        }
        return {pool: found.get(name, 0) for pool, name in names.items()}

    def _services(self, names: list[str]) -> "list[ServiceTypeDef]":
        with explained(f"cluster {self._name}"):
            try:
                answer = self._ecs.describe_services(cluster=self._name, services=names)
            except ClientError as error:
                if code_of(error) in _ABSENT:
                    return []
                raise
        return [service for service in answer["services"] if service["status"] == "ACTIVE"]

    def _empty_pools(self) -> None:
        for service in self._services(list(service_names(self._name).values())):
            name = service["serviceName"]
            with explained(f"service {name}"):
                self._ecs.update_service(cluster=self._name, service=name, desiredCount=0)

    def _release_machines(self) -> None:
        """Instances that are protected from scale-in would keep the stack from being deleted."""
        name = f"{self._name}-machines"
        with explained(f"Auto Scaling group {name}"):
            groups = self._machines.describe_auto_scaling_groups(AutoScalingGroupNames=[name])
            for group in groups["AutoScalingGroups"]:
                self._machines.update_auto_scaling_group(
                    AutoScalingGroupName=name,
                    MinSize=0,
                    MaxSize=0,
                    DesiredCapacity=0,
                    NewInstancesProtectedFromScaleIn=False,
                )
                protected = [
                    machine["InstanceId"]
                    for machine in group.get("Instances", [])
                    if machine["ProtectedFromScaleIn"]
                ]
                if protected:
                    self._machines.set_instance_protection(
                        AutoScalingGroupName=name,
                        InstanceIds=protected,
                        ProtectedFromScaleIn=False,
                    )

    # --- the model bucket -------------------------------------------------------------------------

    def _bucket(self) -> str:
        with explained("who we are"):
            account = self._sts.get_caller_identity()["Account"]
        return model_bucket(self._name, account, self._region)

    def _bucket_exists(self, bucket: str) -> bool:
        with explained(f"bucket {bucket}"):
            try:
                self._s3.head_bucket(Bucket=bucket)
            except ClientError as error:
                if code_of(error) in _NO_BUCKET:
                    return False
                raise
        return True

    def _ensure_bucket(self, bucket: str) -> None:
        with explained(f"bucket {bucket}"):
            if not self._bucket_exists(bucket):
                place: dict[str, Any] = {}
                if self._region != "us-east-1":  # the one region that must not be named
                    place["CreateBucketConfiguration"] = {"LocationConstraint": self._region}
                self._s3.create_bucket(Bucket=bucket, **place)
            # Set every time: a crash may have come between the bucket and these.
            self._s3.put_public_access_block(
                Bucket=bucket,
                PublicAccessBlockConfiguration={
                    "BlockPublicAcls": True,
                    "IgnorePublicAcls": True,
                    "BlockPublicPolicy": True,
                    "RestrictPublicBuckets": True,
                },
            )
            tags = {"TagSet": [{"Key": TAG, "Value": self._name}]}
            self._s3.put_bucket_tagging(Bucket=bucket, Tagging=tags)  # type: ignore[arg-type]

    def _require_model(self, bucket: str, prefix: str) -> None:
        """A router without a tokenizer ends at once, and CloudFormation would roll the stack back."""
        where = f"s3://{bucket}/{prefix}"
        with explained(f"model {where}"):
            found = self._s3.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1)
        if not found.get("KeyCount"):
            raise ProviderMissing(
                f"aws: no model at {where}: `aws s3 sync ./my-model {where.rstrip('/')}/`, then apply "
                "again"
            )

    def _delete_bucket(self, bucket: str) -> None:
        with explained(f"bucket {bucket}"):
            pages = self._s3.get_paginator("list_object_versions").paginate(Bucket=bucket)
            for page in pages:
                entries: list[Any] = [*page.get("Versions", []), *page.get("DeleteMarkers", [])]
                doomed: list[Any] = [
                    {"Key": entry["Key"], "VersionId": entry["VersionId"]} for entry in entries
                ]
                if doomed:
                    self._s3.delete_objects(
                        Bucket=bucket, Delete={"Objects": doomed, "Quiet": True}
                    )
            self._s3.delete_bucket(Bucket=bucket)


def require(status: DeploymentStatus, name: str) -> DeploymentStatus:
    """`status`, of a deployment that is there."""
    if status.state is None:
        raise ProviderMissing(f"aws: there is no stack {name}; `kvrelay deploy aws apply` makes it")
    return status


def _line(service: "ServiceTypeDef") -> ServiceLine:
    events = service.get("events", [])
    latest = events[0]["message"] if events else ""
    return ServiceLine(
        service["serviceName"], service["desiredCount"], service["runningCount"], latest
    )
