"""`kvrelay deploy aws` against moto: what is made, what a crash leaves, what is left at the end."""

from dataclasses import replace

import boto3
import pytest
from aws_inventory import desired, inventory
from crashing_aws import REGION, Crashed, CrashingSession

from kvrelay_infra.providers import Pool
from kvrelay_infra.providers.aws import Deployment
from kvrelay_infra.providers.aws.plan import template
from kvrelay_infra.providers.aws.settings import PoolSize
from kvrelay_infra.providers.aws.stack import Stack, Step, next_step
from kvrelay_protocol.errors import ProviderError, ProviderMissing, ProviderUnreachable

NAME = "kvrelay"
BUCKET = f"kvrelay-models-123456789012-{REGION}"


def deployment(session):
    return Deployment(session, NAME, say=lambda line: None, sleep=lambda seconds: None)


def apply(it, settings):
    """As a user does it: the first one makes the bucket, and asks for the model."""
    try:
        it.apply(settings)
    except ProviderMissing:
        it._s3.put_object(Bucket=BUCKET, Key="model/config.json", Body=b"{}")
        it.apply(settings)


def crash_everywhere(run):
    """Run it with a crash before its call 0, 1, 2 ...; yields after each, and ends with a whole run."""
    crashing, at = CrashingSession(), 0
    it = deployment(crashing.session)
    while True:
        crashing.crash_at(at)
        try:
            run(it)
        except Crashed:
            yield crashing.calls
            at += 1
        else:
            assert len(crashing.calls) == at
            return


def test_apply_converges_after_a_crash_between_any_two_calls(aws, settings):
    healthy, empty = deployment(aws), inventory(aws, NAME)
    apply(healthy, settings)
    whole, running = inventory(aws, NAME), desired(aws, NAME)
    assert running == {"kvrelay-router": 1, "kvrelay-prefill": 0, "kvrelay-decode": 0}
    assert {kind for kind, found in whole.items() if found == empty[kind]} == set()
    healthy.destroy(delete_models=True)
    crashed: list[list[str]] = []
    for calls in crash_everywhere(lambda it: apply(it, settings)):
        apply(healthy, settings)
        assert inventory(aws, NAME) == whole, calls
        assert desired(aws, NAME) == running, calls
        healthy.destroy(delete_models=True)
        crashed.append(calls)
    assert {"CreateBucket", "PutPublicAccessBlock", "PutBucketTagging", "CreateStack"} <= set(
        crashed[-1]
    )


def test_destroy_leaves_nothing_after_a_crash_between_any_two_calls(aws, settings):
    healthy, empty = deployment(aws), inventory(aws, NAME)
    apply(healthy, settings)
    crashed: list[list[str]] = []
    for calls in crash_everywhere(lambda it: it.destroy(delete_models=True)):
        assert healthy.destroy(delete_models=True) == []
        assert inventory(aws, NAME) == empty, calls
        apply(healthy, settings)
        crashed.append(calls)
    assert inventory(aws, NAME) == empty
    assert {"UpdateService", "UpdateAutoScalingGroup", "DeleteStack", "DeleteObjects"} <= set(
        crashed[-1]
    )


def test_the_models_are_kept_unless_asked_for_and_found_again(aws, settings):
    apply(deployment(aws), settings)
    kept = deployment(aws).destroy()
    assert kept == [f"s3://{BUCKET} with the model's files (--delete-models removes it)"]
    assert {kind: found for kind, found in inventory(aws, NAME).items() if found and kind not in
            {"groups", "tagged"}} == {"buckets": [BUCKET]}  # fmt: skip
    apply(deployment(aws), settings)
    assert aws.client("s3").head_object(Bucket=BUCKET, Key="model/config.json")


def test_without_a_model_nothing_but_its_bucket_is_made(aws, settings):
    with pytest.raises(ProviderMissing) as caught:
        deployment(aws).apply(settings)
    assert str(caught.value) == (
        f"aws: no model at s3://{BUCKET}/model: `aws s3 sync ./my-model s3://{BUCKET}/model/`, "
        "then apply again"
    )
    assert inventory(aws, NAME)["stacks"] == []


def test_an_update_keeps_the_workers_that_there_are(aws, settings):
    apply(deployment(aws), settings)
    ecs = aws.client("ecs")
    ecs.update_service(cluster=NAME, service="kvrelay-decode", desiredCount=3)
    ecs.update_service(cluster=NAME, service="kvrelay-prefill", desiredCount=2)
    fewer = {Pool.PREFILL: PoolSize(0, 1), Pool.DECODE: PoolSize(1, 4)}
    deployment(aws).apply(replace(settings, worker_image="kvrelay-worker:2", pools=fewer))
    assert desired(aws, NAME) == {"kvrelay-router": 1, "kvrelay-prefill": 1, "kvrelay-decode": 3}


def test_with_a_model_of_ones_own_no_bucket_is_made(aws, settings):
    aws.client("s3").create_bucket(Bucket="ours")
    aws.client("s3").put_object(Bucket="ours", Key="llama/config.json", Body=b"{}")
    own = replace(settings, model_uri="s3://ours/llama", capacity="fargate")
    deployment(aws).apply(own)
    found = inventory(aws, NAME)
    assert found["buckets"] == ["ours"]
    assert found["machines"] == found["templates"] == []
    [stack] = aws.client("cloudformation").describe_stacks(StackName=NAME)["Stacks"]
    values = {item["ParameterKey"]: item["ParameterValue"] for item in stack["Parameters"]}
    assert (values["ModelUri"], values["ModelBucket"]) == ("s3://ours/llama", "ours")
    status = deployment(aws).status()
    assert status.url.startswith("http://")
    assert [line.name for line in status.services] == [
        "kvrelay-router", "kvrelay-prefill", "kvrelay-decode"]  # fmt: skip


def test_of_a_stack_that_is_not_there_nothing_is_known_and_destroy_does_nothing(aws):
    status = deployment(aws).status()
    assert (status.state, status.services) == (None, ())
    assert deployment(aws).destroy() == []


# --- states that moto never shows: it makes a stack within the call --------------------------------


@pytest.mark.parametrize(
    ("status", "step"),
    [
        (None, Step.CREATE),
        ("DELETE_COMPLETE", Step.CREATE),
        ("CREATE_IN_PROGRESS", Step.WAIT),
        ("UPDATE_COMPLETE_CLEANUP_IN_PROGRESS", Step.WAIT),
        ("DELETE_IN_PROGRESS", Step.WAIT),
        ("ROLLBACK_IN_PROGRESS", Step.WAIT),
        ("REVIEW_IN_PROGRESS", Step.DELETE),
        ("ROLLBACK_COMPLETE", Step.DELETE),
        ("DELETE_FAILED", Step.DELETE),
        ("CREATE_COMPLETE", Step.UPDATE),
        ("UPDATE_ROLLBACK_COMPLETE", Step.UPDATE),
        ("UPDATE_ROLLBACK_FAILED", Step.GIVE_UP),
        ("SOMETHING_NEW", Step.GIVE_UP),
    ],
)
def test_every_status_has_a_step(status, step):
    assert next_step(status) is step


MINIMAL = '{"Resources": {"Logs": {"Type": "AWS::Logs::LogGroup"}}}'


def session_that_says(*statuses):
    """The first answers of DescribeStacks carry these statuses, the rest the truth."""
    session, left = boto3.Session(region_name=REGION), list(statuses)

    def rewrite(parsed, **_):
        if left and parsed.get("Stacks"):
            parsed["Stacks"][0]["StackStatus"] = left.pop(0)

    session.events.register("after-call.cloudformation.DescribeStacks", rewrite)
    return session


def stack_of(session):
    slept: list[float] = []
    said: list[str] = []
    return Stack(session, NAME, say=said.append, sleep=slept.append), slept, said


def test_a_creation_that_another_run_began_is_waited_for(aws):
    stack_of(aws)[0].ensure(MINIMAL, {})
    stack, slept, _ = stack_of(session_that_says("CREATE_IN_PROGRESS", "CREATE_IN_PROGRESS"))
    stack.ensure(MINIMAL, {})
    assert len(slept) == 2
    assert stack.status() in {"CREATE_COMPLETE", "UPDATE_COMPLETE"}


def test_what_a_failed_creation_has_left_is_removed_first(aws):
    stack_of(aws)[0].ensure(MINIMAL, {})
    stack, _, said = stack_of(session_that_says("ROLLBACK_COMPLETE", "ROLLBACK_COMPLETE"))
    stack.ensure(MINIMAL, {})
    assert said == [
        "removing stack kvrelay, whose creation failed (ROLLBACK_COMPLETE)",
        "creating stack kvrelay; this takes some minutes",
    ]
    assert stack.status() == "CREATE_COMPLETE"


def test_a_failure_is_told_with_its_reason(aws):
    stack_of(aws)[0].ensure(MINIMAL, {})
    session = session_that_says("UPDATE_COMPLETE", "UPDATE_ROLLBACK_COMPLETE")

    def fail(parsed, **_):
        parsed["StackEvents"] = [
            {"LogicalResourceId": "Later", "ResourceStatus": "CREATE_FAILED",
             "ResourceStatusReason": "cancelled"},
            {"LogicalResourceId": "Machines", "ResourceStatus": "CREATE_FAILED",
             "ResourceStatusReason": "no subnet in that zone"},
        ]  # fmt: skip

    session.events.register("after-call.cloudformation.DescribeStackEvents", fail)
    with pytest.raises(ProviderError) as caught:
        stack_of(session)[0].ensure(MINIMAL, {})
    assert str(caught.value) == (
        "aws: stack kvrelay is UPDATE_ROLLBACK_COMPLETE: Machines: no subnet in that zone"
    )


def test_one_that_never_ends_is_given_up(aws, monkeypatch):
    monkeypatch.setattr("kvrelay_infra.providers.aws.stack._LONGEST_S", 60)
    stack_of(aws)[0].ensure(MINIMAL, {})
    session = session_that_says(*["UPDATE_IN_PROGRESS"] * 10_000)
    with pytest.raises(ProviderUnreachable, match="is still UPDATE_IN_PROGRESS after 60 s"):
        stack_of(session)[0].ensure(MINIMAL, {})


def test_the_template_fits_into_the_call_that_carries_it():
    assert len(template().encode()) <= 51_200


def test_missing_stacks_are_missing(aws):
    from kvrelay_infra.providers.aws.deployment import require

    with pytest.raises(ProviderMissing, match="there is no stack kvrelay"):
        require(deployment(aws).status(), NAME)
