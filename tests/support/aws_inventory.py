"""Everything in an account that a deployment may make, in words that do not change from run to run."""

import functools
import re
from typing import Any

import boto3
from moto.ecs.models import ecs_backends

_ACCOUNT = "123456789012"
_RANDOM = re.compile(r"-[A-Z0-9]{10,14}(-\d+)?(-\w{6})?$|[-_][0-9a-f]{8,17}$")


@functools.cache
def _client(session: boto3.Session, service: str) -> Any:
    return session.client(service)


def inventory(session: boto3.Session, stack: str) -> dict[str, list[Any]]:
    """By kind; names without what AWS appends to make them unique."""

    def names(service: str, operation: str, items: str, field: str) -> list[str]:
        answer = getattr(_client(session, service), operation)()
        return sorted(_RANDOM.sub("", item[field]) for item in answer[items])

    ecs = _client(session, "ecs")
    return {
        "buckets": names("s3", "list_buckets", "Buckets", "Name"),
        "stacks": sorted(
            item["StackName"]
            for item in _client(session, "cloudformation").describe_stacks()["Stacks"]
        ),
        "secrets": names("secretsmanager", "list_secrets", "SecretList", "Name"),
        "alarms": names("cloudwatch", "describe_alarms", "MetricAlarms", "AlarmName"),
        "logs": names("logs", "describe_log_groups", "logGroups", "logGroupName"),
        "roles": names("iam", "list_roles", "Roles", "RoleName"),
        "profiles": names("iam", "list_instance_profiles", "InstanceProfiles",
                          "InstanceProfileName"),
        "groups": names("ec2", "describe_security_groups", "SecurityGroups", "GroupName"),
        "templates": names("ec2", "describe_launch_templates", "LaunchTemplates",
                           "LaunchTemplateName"),
        "machines": names("autoscaling", "describe_auto_scaling_groups", "AutoScalingGroups",
                          "AutoScalingGroupName"),
        "balancers": names("elbv2", "describe_load_balancers", "LoadBalancers",
                           "LoadBalancerName"),
        "targets": [item["Port"] for item in
                    _client(session, "elbv2").describe_target_groups()["TargetGroups"]],
        "namespaces": names("servicediscovery", "list_namespaces", "Namespaces", "Name"),
        "discovered": names("servicediscovery", "list_services", "Services", "Name"),
        "clusters": sorted(
            item["clusterName"]
            for item in ecs.describe_clusters(clusters=ecs.list_clusters()["clusterArns"])["clusters"]
            if item["status"] == "ACTIVE"
        ),
        # moto describes capacity providers by name only.
        "capacity": sorted(
            _RANDOM.sub("", name)
            for name in ecs_backends[_ACCOUNT][session.region_name].capacity_providers
        ),
        "services": sorted(
            service.name
            for service in ecs_backends[_ACCOUNT][session.region_name].services.values()
            if service.status == "ACTIVE"
        ),
        "tagged": sorted(
            _RANDOM.sub("", item["ResourceARN"].split("/")[0])
            for item in _client(session, "resourcegroupstaggingapi").get_resources(
                TagFilters=[{"Key": "kvrelay-stack", "Values": [stack]}]
            )["ResourceTagMappingList"]
        ),
    }  # fmt: skip


def desired(session: boto3.Session, stack: str) -> dict[str, int]:
    """Of each service."""
    services = [f"{stack}-{name}" for name in ("router", "prefill", "decode")]
    found = _client(session, "ecs").describe_services(cluster=stack, services=services)
    return {item["serviceName"]: item["desiredCount"] for item in found["services"]}
