"""The provider against moto's ECS: two services of a cluster, no tasks behind them."""

import boto3
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from crashing_aws import REGION

from kvrelay_infra.providers import Pool, PoolStatus
from kvrelay_infra.providers.aws import AwsProvider
from kvrelay_protocol import errors

SERVICES = {Pool.PREFILL: "llm-prefill", Pool.DECODE: "llm-decode"}


@pytest.fixture
def ecs(aws):
    ecs = aws.client("ecs")
    ecs.create_cluster(clusterName="llm")
    ecs.register_task_definition(
        family="worker", containerDefinitions=[{"name": "worker", "image": "x", "memory": 1}]
    )
    for name in SERVICES.values():
        ecs.create_service(cluster="llm", serviceName=name, taskDefinition="worker", desiredCount=0)
    return ecs


@pytest.fixture
def session(ecs):
    """Whose hooks a test may use."""
    return boto3.Session(region_name=REGION)


def make(session):
    return AwsProvider(session, cluster="llm", services=SERVICES)


def desired(ecs):
    found = ecs.describe_services(cluster="llm", services=list(SERVICES.values()))["services"]
    return {service["serviceName"]: service["desiredCount"] for service in found}


async def test_both_pools_go_from_zero_to_one_to_many_and_back(ecs, session):
    provider = make(session)
    for replicas in (1, 4, 0):
        for pool, name in SERVICES.items():
            await provider.scale(pool, replicas)
            assert desired(ecs)[name] == replicas
        described = await provider.describe()
        assert {status.desired for status in described.values()} == {replicas}
    await provider.close()


async def test_a_number_that_is_set_already_is_not_written(ecs, session):
    calls = []
    session.events.register("before-call", lambda model, **_: calls.append(model.name))
    provider = make(session)
    for _ in range(2):
        await provider.scale(Pool.DECODE, 2)
    assert calls.count("UpdateService") == 1


@pytest.mark.parametrize("lost", ["before-call", "after-call"])
async def test_a_crash_around_the_write_is_mended_by_the_next_call(ecs, session, lost):
    def crash(**_):
        raise KeyboardInterrupt

    session.events.register(f"{lost}.ecs.UpdateService", crash)
    with pytest.raises(KeyboardInterrupt):
        make(session)._scale("llm-decode", 3)
    assert desired(ecs)["llm-decode"] == (3 if lost == "after-call" else 0)
    await make(boto3.Session(region_name=REGION)).scale(Pool.DECODE, 3)
    assert desired(ecs)["llm-decode"] == 3


async def test_a_service_that_application_auto_scaling_has_is_refused(ecs, aws, session):
    aws.client("application-autoscaling").register_scalable_target(
        ServiceNamespace="ecs",
        ResourceId="service/llm/llm-decode",
        ScalableDimension="ecs:service:DesiredCount",
        MinCapacity=0,
        MaxCapacity=3,
    )
    provider = make(session)
    with pytest.raises(errors.SecondWriter, match="because Application Auto Scaling sets"):
        await provider.scale(Pool.DECODE, 2)
    assert desired(ecs) == {"llm-prefill": 0, "llm-decode": 0}
    await provider.scale(Pool.PREFILL, 2)
    assert desired(ecs)["llm-prefill"] == 2


def _client_error(code, message):
    def refuse(**_):
        raise ClientError({"Error": {"Code": code, "Message": message}}, "UpdateService")

    return refuse


def _no_network(**_):
    raise EndpointConnectionError(endpoint_url="https://ecs.us-east-1.amazonaws.com/")


@pytest.mark.parametrize(
    ("hook", "error", "text"),
    [
        (_client_error("AccessDeniedException", "not\nauthorized"), errors.ProviderDenied,
         "service llm-decode in cluster llm: UpdateService answered AccessDeniedException: not auth"),
        (_client_error("ExpiredTokenException", "expired"), errors.ProviderDenied, "expired"),
        (_client_error("LimitExceededException", "too many"), errors.ProviderQuota, "Quotas"),
        (_client_error("ThrottlingException", "slow down"), errors.ProviderUnreachable, "slow"),
        (_client_error("ClusterNotFoundException", "none"), errors.ProviderMissing, "none"),
        (_no_network, errors.ProviderUnreachable, "ecs.us-east-1.amazonaws.com"),
    ],
)  # fmt: skip
async def test_a_refusal_is_one_line(session, hook, error, text):
    session.events.register("before-call.ecs.UpdateService", hook)
    with pytest.raises(error, match=text) as caught:
        await make(session).scale(Pool.DECODE, 2)
    assert "\n" not in str(caught.value)


async def test_a_service_that_is_not_there_is_named(ecs, session):
    ecs.delete_service(cluster="llm", service="llm-decode", force=True)
    with pytest.raises(errors.ProviderMissing, match="no active service llm-decode"):
        await make(session).describe()


async def test_pools_are_described_with_the_trouble_of_the_pending_ones(session):
    # moto places no task and has no events: the numbers are those of an answer of ECS.
    def answer(parsed, **_):
        for service in parsed["services"]:
            prefix = f"(service {service['serviceName']}) "
            service.update(desiredCount=3, runningCount=1 if "decode" in prefix else 3, events=[
                {"message": f"{prefix}has started 1 tasks: (task 5)."},
                {"message": f"{prefix}was unable to place a task because no container instance met "
                            "all of its requirements."},
            ])  # fmt: skip

    session.events.register("after-call.ecs.DescribeServices", answer)
    assert await make(session).describe() == {
        Pool.PREFILL: PoolStatus(3, 3, 0),
        Pool.DECODE: PoolStatus(3, 1, 2, "was unable to place a task because no container instance "
                                         "met all of its requirements."),
    }  # fmt: skip
