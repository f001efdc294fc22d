"""The resource types of our template that moto's CloudFormation does not know.

Their services moto knows, so each is created and deleted there: a stack that leaves one behind is seen.
Importing this module teaches moto; do so before the first `mock_aws`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from moto.cloudformation.utils import yaml_tag_constructor
from moto.cloudwatch.models import cloudwatch_backends
from moto.core.common_models import CloudFormationModel
from moto.ecs.models import Cluster, Service, ecs_backends
from moto.elbv2.models import FakeTargetGroup, elbv2_backends
from moto.secretsmanager.models import secretsmanager_backends
from moto.servicediscovery.models import servicediscovery_backends


class Loader(yaml.CLoader):
    """libyaml's, with CloudFormation's tags."""


yaml.add_multi_constructor("", yaml_tag_constructor, Loader=Loader)


@dataclass(frozen=True)
class Made:
    """What a template may refer to."""

    ref: str
    attributes: Mapping[str, str]


Create = Callable[[str, dict[str, Any], str, str], Made]
Delete = Callable[[str, str, str], None]


def _teach(kind: str, create: Create, delete: Delete) -> None:
    class Resource(CloudFormationModel):
        __module__ = "moto.kvrelay.models"  # moto files instances by the second part

        def __init__(self, made: Made) -> None:
            self._made = made

        @property
        def physical_resource_id(self) -> str:
            return self._made.ref

        @staticmethod
        def cloudformation_name_type() -> str:
            return ""

        @staticmethod
        def cloudformation_type() -> str:
            return kind

        @classmethod
        def has_cfn_attr(cls, attr: str) -> bool:
            return attr in {"Arn", "Id"}

        def get_cfn_attribute(self, attribute_name: str) -> str:
            return self._made.attributes[attribute_name]

        @classmethod
        def create_from_cloudformation_json(cls, resource_name, cloudformation_json, account_id,
                                            region_name, **kwargs):  # fmt: skip
            properties = cloudformation_json["Properties"]
            return cls(create(resource_name, properties, account_id, region_name))

        @classmethod
        def update_from_cloudformation_json(cls, original_resource, new_resource_name,
                                            cloudformation_json, account_id, region_name):  # fmt: skip
            return original_resource

        @classmethod
        def delete_from_cloudformation_json(cls, resource_name, cloudformation_json, account_id,
                                            region_name):  # fmt: skip
            delete(resource_name, account_id, region_name)

        def delete(self, account_id: str, region: str) -> None:
            delete(self._made.ref, account_id, region)

        def is_created(self) -> bool:
            return True

    _TAUGHT.append(Resource)


_TAUGHT: list[type] = []
"""moto finds them as subclasses, which Python holds weakly."""


def _secret(name, properties, account, region):
    backend = secretsmanager_backends[account][region]
    backend.create_secret(
        name=name, secret_string="generated", secret_binary=None,
        description=properties.get("Description"), tags=[], kms_key_id=None,
        client_request_token=None, replica_regions=[], force_overwrite=False,
    )  # fmt: skip
    return Made(backend.secrets[name].arn, {})


def _secret_gone(name, account, region):
    secretsmanager_backends[account][region].delete_secret(name, None, True)


def _alarm(name, properties, account, region):
    cloudwatch_backends[account][region].put_metric_alarm(
        name=name, namespace=properties["Namespace"], metric_name=properties["MetricName"],
        comparison_operator=properties["ComparisonOperator"],
        evaluation_periods=properties["EvaluationPeriods"], period=properties["Period"],
        threshold=properties["Threshold"], statistic=properties["Statistic"],
        description=properties["AlarmDescription"], dimensions=[],
        alarm_actions=properties.get("AlarmActions", []),
    )  # fmt: skip
    return Made(name, {})


def _alarm_gone(name, account, region):
    cloudwatch_backends[account][region].delete_alarms([name])


def _capacity(name, properties, account, region):
    details = {
        key[0].lower() + key[1:]: value
        for key, value in properties["AutoScalingGroupProvider"].items()
    }
    ecs_backends[account][region].create_capacity_provider(name, details, [])
    return Made(name, {})


def _capacity_gone(name, account, region):
    ecs_backends[account][region].delete_capacity_provider(name)


def _association(name, properties, account, region):
    ecs_backends[account][region].put_cluster_capacity_providers(
        properties["Cluster"], properties["CapacityProviders"], []
    )
    return Made(name, {})


def _namespace(name, properties, account, region):
    backend = servicediscovery_backends[account][region]
    backend.create_private_dns_namespace(properties["Name"], name, "", properties["Vpc"], [], {})
    [made] = [item for item in backend.namespaces.values() if item.name == properties["Name"]]
    return Made(made.id, {"Arn": made.arn})


def _namespace_gone(name, account, region):
    servicediscovery_backends[account][region].delete_namespace(name)


def _discovered(name, properties, account, region):
    made = servicediscovery_backends[account][region].create_service(
        properties["Name"], properties["NamespaceId"], name, "", properties["DnsConfig"], {}, {},
        [], "DNS",
    )  # fmt: skip
    return Made(made.id, {"Arn": made.arn})


def _discovered_gone(name, account, region):
    servicediscovery_backends[account][region].delete_service(name)


_teach("AWS::SecretsManager::Secret", _secret, _secret_gone)
_teach("AWS::CloudWatch::Alarm", _alarm, _alarm_gone)
_teach("AWS::ECS::CapacityProvider", _capacity, _capacity_gone)
_teach("AWS::ECS::ClusterCapacityProviderAssociations", _association, lambda *_: None)
_teach("AWS::ServiceDiscovery::PrivateDnsNamespace", _namespace, _namespace_gone)
_teach("AWS::ServiceDiscovery::Service", _discovered, _discovered_gone)


def _target_group_gone(cls, resource_name, cloudformation_json, account_id, region_name):
    elbv2_backends[account_id][region_name].delete_target_group(resource_name)


def _cluster_gone(cls, resource_name, cloudformation_json, account_id, region_name):
    ecs_backends[account_id][region_name].delete_cluster(resource_name)


def _service_gone(cls, resource_name, cloudformation_json, account_id, region_name):
    _, cluster, service = resource_name.split("/")  # an ARN
    ecs_backends[account_id][region_name].delete_service(cluster, service, force=True)


# moto makes these of a stack and leaves them behind.
FakeTargetGroup.delete_from_cloudformation_json = classmethod(_target_group_gone)
Service.delete_from_cloudformation_json = classmethod(_service_gone)
Cluster.delete_from_cloudformation_json = classmethod(_cluster_gone)
