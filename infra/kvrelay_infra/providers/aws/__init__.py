"""AWS through boto3: the provider that scales two ECS services, and the deployment they belong to."""

from kvrelay_infra.providers.aws.deployment import Deployment
from kvrelay_infra.providers.aws.plan import Plan, Prices, load_prices, make_plan
from kvrelay_infra.providers.aws.provider import AwsProvider
from kvrelay_infra.providers.aws.settings import DeploySettings

__all__ = [
    "AwsProvider",
    "DeploySettings",
    "Deployment",
    "Plan",
    "Prices",
    "load_prices",
    "make_plan",
]
