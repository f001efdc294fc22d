"""What a deployment on AWS is made of, and the names that follow from it."""

from collections.abc import Mapping
from dataclasses import dataclass

from kvrelay_infra.providers.base import Pool
from kvrelay_protocol.errors import UsageError

TAG = "kvrelay-stack"
"""On everything that is made; its value is the stack's name."""

MODEL_PREFIX = "model"
"""In the bucket that is made for the model."""


@dataclass(frozen=True, slots=True)
class PoolSize:
    """Workers of one pool."""

    least: int
    most: int


@dataclass(frozen=True, slots=True)
class DeploySettings:
    """A stack, checked. `kvrelay deploy aws --help` explains each field."""

    stack: str
    region: str
    vpc: str
    router_subnets: tuple[str, ...]
    worker_subnets: tuple[str, ...]
    router_image: str
    worker_image: str
    pools: Mapping[Pool, PoolSize]
    capacity: str = "gpu"
    instance_type: str = "g5.xlarge"
    worker_cpu: int = 4096
    worker_memory: int = 14336
    """MiB."""
    model_uri: str = ""
    """Empty: `MODEL_PREFIX` in a bucket made for it."""
    scheme: str = "internal"
    allowed_cidr: str = "10.0.0.0/8"
    certificate_arn: str = ""
    alarm_topic_arn: str = ""
    assign_public_ip: bool = False

    def __post_init__(self) -> None:
        for pool, size in self.pools.items():
            if size.least > size.most:
                raise UsageError(
                    f"--min-{pool} {size.least} is above --max-{pool} {size.most}: lower the one "
                    "or raise the other"
                )
        if len(self.router_subnets) < 2:
            raise UsageError(
                f"--router-subnets has {len(self.router_subnets)}: a load balancer needs 2, in "
                "different zones"
            )
        if self.scheme == "internet-facing" and not self.certificate_arn:
            raise UsageError(
                "--scheme internet-facing without --certificate-arn would send API keys and prompts "
                "in clear: give a certificate of ACM"
            )
        if self.model_uri and not self.model_uri.startswith("s3://"):
            raise UsageError(f"--model-uri {self.model_uri}: must begin with s3://")

    @property
    def most_workers(self) -> int:
        return sum(size.most for size in self.pools.values())

    def parameters(self, desired: Mapping[Pool, int], bucket: str) -> dict[str, str]:
        """Of the template; `desired` is what the services have now, `bucket` where the model lies."""
        least_and_most = {
            f"{bound}{pool.capitalize()}": str(number)
            for pool, size in self.pools.items()
            for bound, number in (("Min", size.least), ("Max", size.most))
        }
        return least_and_most | {
            "VpcId": self.vpc,
            "RouterSubnets": ",".join(self.router_subnets),
            "WorkerSubnets": ",".join(self.worker_subnets),
            "Capacity": self.capacity,
            "InstanceType": self.instance_type,
            # A rolling update starts the new worker before it ends the old one.
            "MaxInstances": str(self.most_workers + 1),
            "RouterImage": self.router_image,
            "WorkerImage": self.worker_image,
            "ModelUri": self.model_uri or f"s3://{bucket}/{MODEL_PREFIX}",
            "ModelBucket": bucket,
            "WorkerCpu": str(self.worker_cpu),
            "WorkerMemory": str(self.worker_memory),
            "PrefillDesired": str(desired[Pool.PREFILL]),
            "DecodeDesired": str(desired[Pool.DECODE]),
            "Scheme": self.scheme,
            "AllowedCidr": self.allowed_cidr,
            "CertificateArn": self.certificate_arn,
            "AlarmTopicArn": self.alarm_topic_arn,
            "AssignPublicIp": "ENABLED" if self.assign_public_ip else "DISABLED",
        }


def service_names(stack: str) -> dict[Pool, str]:
    """Of the stack's cluster, which has the stack's name."""
    return {pool: f"{stack}-{pool}" for pool in Pool}


def model_bucket(stack: str, account: str, region: str) -> str:
    """The same at every apply, so that a kept bucket is found again."""
    return f"{stack}-models-{account}-{region}"
