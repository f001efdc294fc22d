"""What `kvrelay deploy aws` does and prints."""

import sys
from types import SimpleNamespace

import boto3
from botocore.exceptions import ProfileNotFound

from kvrelay_infra.providers import Pool
from kvrelay_infra.providers.aws import Deployment, DeploySettings, Plan, load_prices, make_plan
from kvrelay_infra.providers.aws.deployment import require
from kvrelay_infra.providers.aws.settings import PoolSize
from kvrelay_protocol.errors import ProviderDenied, UsageError

_NEEDED = ("vpc", "router_subnets", "worker_subnets", "router_image", "worker_image")


def run_deploy(values: SimpleNamespace) -> int:
    """Carry out one action; returns the exit code."""
    session = _session(values.region)
    if values.action in {"plan", "apply"}:
        settings = _settings(values, session.region_name)
        plan = make_plan(settings, load_prices(values.prices))
        print("\n".join(plan_lines(plan, settings)))
        if values.action == "apply":
            print()
            Deployment(session, values.stack).apply(settings)
            print("\n".join(_status_lines(Deployment(session, values.stack), values.stack)))
        return 0
    deployment = Deployment(session, values.stack)
    if values.action == "status":
        print("\n".join(_status_lines(deployment, values.stack)))
        return 0
    return _destroy(deployment, values)


def plan_lines(plan: Plan, settings: DeploySettings) -> list[str]:
    """The plan as text, at most 80 columns wide where names allow it."""
    prices = plan.prices
    lines = [f"stack {settings.stack} in {settings.region}: creates or updates"]
    widest = max(len(name) for _, name in plan.resources)
    lines += [f"  {name:<{widest}} {kind}" for kind, name in plan.resources]
    lines += ["", f"{prices.currency} an hour{'at zero':>42}{'at min':>10}{'at max':>10}"]
    for line in (*plan.costs, plan.total):
        amounts = "".join(f"{amount:>10.4f}" for amount in (line.at_zero, line.at_min, line.at_max))
        lines.append(f"  {line.what:<47}{amounts}")
    lines += ["", f"Prices: {prices.region}, {prices.as_of}. {prices.note}"]
    if prices.region != settings.region:
        lines.append(f"They are not those of {settings.region}.")
    lines.append(
        "Not counted: NAT gateways, traffic, load balancer capacity units, logs, model storage "
        f"({prices.bucket_gib_month:g} {prices.currency} a GiB and month)."
    )
    return lines


def _destroy(deployment: Deployment, values: SimpleNamespace) -> int:
    if not values.yes and not _agreed(values):
        print("nothing was destroyed")
        return 1
    kept = deployment.destroy(delete_models=values.delete_models)
    print("\n".join(f"kept: {line}" for line in kept) or "nothing is left")
    return 0


def _agreed(values: SimpleNamespace) -> bool:
    if not sys.stdin.isatty():
        raise UsageError(f"destroy of stack {values.stack}: give --yes where nobody can be asked")
    what = "and its models " if values.delete_models else ""
    return input(f"destroy stack {values.stack} {what}(yes/no)? ").strip() == "yes"


def _status_lines(deployment: Deployment, name: str) -> list[str]:
    status = require(deployment.status(), name)
    lines = [f"stack {name}: {status.state}", f"url: {status.url}"]
    lines += [
        f"  {line.name:<32}{line.running} of {line.desired} running  {line.latest_event}".rstrip()
        for line in status.services
    ]
    return [
        *lines,
        f"logs: aws logs tail {status.log_group} --follow",
        f"API key: aws secretsmanager get-secret-value --secret-id {status.api_key_secret}",
    ]


def _session(region: str | None) -> boto3.Session:
    try:
        session = boto3.Session(region_name=region)
    except ProfileNotFound as error:
        raise ProviderDenied(f"aws: {error}; set AWS_PROFILE to one of ~/.aws/config") from error
    if not session.region_name:
        raise UsageError("no AWS region: give --region, or set AWS_REGION or one in ~/.aws/config")
    return session


def _settings(values: SimpleNamespace, region: str) -> DeploySettings:
    missing = [f"--{name.replace('_', '-')}" for name in _NEEDED if not getattr(values, name)]
    if missing:
        raise UsageError(f"{values.action} needs {', '.join(missing)}")
    pools = {
        pool: PoolSize(getattr(values, f"min_{pool}"), getattr(values, f"max_{pool}"))
        for pool in Pool
    }
    return DeploySettings(
        stack=values.stack,
        region=region,
        vpc=values.vpc,
        router_subnets=values.router_subnets,
        worker_subnets=values.worker_subnets,
        router_image=values.router_image,
        worker_image=values.worker_image,
        pools=pools,
        capacity=values.capacity,
        instance_type=values.instance_type,
        worker_cpu=values.worker_cpu,
        worker_memory=values.worker_memory,
        model_uri=values.model_uri,
        scheme=values.scheme,
        allowed_cidr=values.allowed_cidr,
        certificate_arn=values.certificate_arn,
        alarm_topic_arn=values.alarm_topic_arn,
        assign_public_ip=values.assign_public_ip,
    )
