"""What `apply` will create and what it costs per hour, before anything is done. No call to AWS."""

import json
import re
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Self

from kvrelay_infra.providers.aws.settings import DeploySettings, model_bucket
from kvrelay_protocol.errors import UsageError

_HOURS_A_MONTH = 730
_DISK_GIB = 100
"""Root volume in the template."""
_ROUTER_VCPU, _ROUTER_GIB = 1, 2
_RESOURCE = re.compile(
    r"^  (\w+):\n(?: +#.*\n)*    Type: (AWS::\S+)\n(    Condition: OnGpu\n)?", re.MULTILINE
)


@dataclass(frozen=True, slots=True)
class Prices:
    """List prices in `currency`; an hour, a month or a GiB of each thing as its field says."""

    note: str
    as_of: str
    region: str
    currency: str
    instance_hour: dict[str, float]
    fargate_vcpu_hour: float
    fargate_gib_hour: float
    disk_gib_month: float
    load_balancer_hour: float
    public_ipv4_hour: float
    secret_month: float
    alarm_month: float
    private_zone_month: float
    bucket_gib_month: float

    @classmethod
    def parse(cls, text: str, origin: str) -> Self:
        """From JSON.

        Raises:
            UsageError: it is no JSON object, or a field is missing or unknown.
        """
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            names = ", ".join(field.name for field in fields(cls))
            raise UsageError(f"{origin}: {error}; it must be a JSON object of {names}") from error


@dataclass(frozen=True, slots=True)
class CostLine:
    """Currency an hour, with both pools at zero, at their least and at their most."""

    what: str
    at_zero: float
    at_min: float
    at_max: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What is made, and what it costs."""

    resources: tuple[tuple[str, str], ...]
    """(type, name), in the template's order."""
    costs: tuple[CostLine, ...]
    prices: Prices

    @property
    def total(self) -> CostLine:
        return CostLine(
            "total",
            sum(line.at_zero for line in self.costs),
            sum(line.at_min for line in self.costs),
            sum(line.at_max for line in self.costs),
        )


def load_prices(path: Path | None = None) -> Prices:
    """From `path`, or those that come with kvrelay."""
    if path is not None:
        return Prices.parse(path.read_text(), str(path))
    shipped = resources.files("kvrelay_infra.providers.aws").joinpath("prices.json")
    return Prices.parse(shipped.read_text(), "prices.json")


def template() -> str:
    """The CloudFormation template."""
    return resources.files("kvrelay_infra.providers.aws").joinpath("kvrelay.yaml").read_text()


def make_plan(settings: DeploySettings, prices: Prices) -> Plan:
    """Raises `UsageError` for an instance type without a price."""
    return Plan(tuple(_resources(settings)), tuple(_costs(settings, prices)), prices)


def _resources(settings: DeploySettings) -> list[tuple[str, str]]:
    body = template().partition("\nResources:\n")[2].partition("\nOutputs:\n")[0]
    on_gpu = settings.capacity == "gpu"
    found = [
        (kind, name) for name, kind, needs_gpu in _RESOURCE.findall(body) if on_gpu or not needs_gpu
    ]
    if not settings.model_uri:
        bucket = model_bucket(settings.stack, "ACCOUNT", settings.region)
        found.append(("AWS::S3::Bucket (kept by destroy)", bucket))
    return found


def _costs(settings: DeploySettings, prices: Prices) -> list[CostLine]:
    kinds = [kind for kind, _ in _resources(settings)]

    def always(what: str, an_hour: float) -> CostLine:
        return CostLine(what, an_hour, an_hour, an_hour)

    def monthly(kind: str, price: float) -> float:
        return kinds.count(kind) * price / _HOURS_A_MONTH

    router = _fargate(prices, _ROUTER_VCPU, _ROUTER_GIB)
    addresses = len(settings.router_subnets) if settings.scheme == "internet-facing" else 0
    addresses += 1 if settings.assign_public_ip else 0
    lines = [
        always("router (Fargate, 1 vCPU, 2 GiB)", router),
        always("load balancer, without traffic", prices.load_balancer_hour),
        always("secrets", monthly("AWS::SecretsManager::Secret", prices.secret_month)),
        always("alarms", monthly("AWS::CloudWatch::Alarm", prices.alarm_month)),
        always("private DNS zone",
               monthly("AWS::ServiceDiscovery::PrivateDnsNamespace", prices.private_zone_month)),
    ]  # fmt: skip
    if addresses:
        lines.append(always("public addresses", addresses * prices.public_ipv4_hour))
    what, each = _worker(settings, prices)
    for pool, size in settings.pools.items():
        named = f"{pool}: {size.least} to {size.most} x {what}"
        lines.append(CostLine(named, 0.0, size.least * each, size.most * each))
    return lines


def _worker(settings: DeploySettings, prices: Prices) -> tuple[str, float]:
    """What one worker runs on, and its price an hour."""
    if settings.capacity == "fargate":
        vcpu, gib = settings.worker_cpu / 1024, settings.worker_memory / 1024
        each = _fargate(prices, vcpu, gib)
        each += prices.public_ipv4_hour if settings.assign_public_ip else 0.0
        return f"Fargate, {vcpu:g} vCPU, {gib:g} GiB", each
    price = prices.instance_hour.get(settings.instance_type)
    if price is None:
        raise UsageError(
            f"--instance-type {settings.instance_type} has no price; there are "
            f"{', '.join(prices.instance_hour)}; give yours with --prices FILE"
        )
    return settings.instance_type, price + _DISK_GIB * prices.disk_gib_month / _HOURS_A_MONTH


def _fargate(prices: Prices, vcpu: float, gib: float) -> float:
    return vcpu * prices.fargate_vcpu_hour + gib * prices.fargate_gib_hour
