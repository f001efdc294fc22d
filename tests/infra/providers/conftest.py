"""AWS as moto plays it, in this process."""

import boto3
import moto_cloudformation
import pytest
from crashing_aws import REGION
from moto import mock_aws

from kvrelay_infra.providers import Pool
from kvrelay_infra.providers.aws.settings import DeploySettings, PoolSize


@pytest.fixture
def aws(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    # moto reads a template with the loader in Python, which takes most of the time of a test.
    monkeypatch.setattr("moto.cloudformation.models.yaml.Loader", moto_cloudformation.Loader)
    with mock_aws():
        yield boto3.Session(region_name=REGION)


@pytest.fixture
def settings(aws):
    """Of a stack in a network that exists."""
    ec2 = aws.client("ec2")
    vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    subnets = tuple(
        ec2.create_subnet(
            VpcId=vpc, CidrBlock=f"10.0.{number}.0/24", AvailabilityZone=f"{REGION}{zone}"
        )["Subnet"]["SubnetId"]
        for number, zone in enumerate("ab")
    )
    return DeploySettings(
        stack="kvrelay",
        region=REGION,
        vpc=vpc,
        router_subnets=subnets,
        worker_subnets=subnets[:1],
        router_image="kvrelay-router:1",
        worker_image="kvrelay-worker:1",
        pools={Pool.PREFILL: PoolSize(0, 2), Pool.DECODE: PoolSize(0, 4)},
    )
