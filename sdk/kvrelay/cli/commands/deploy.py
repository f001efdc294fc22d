"""`kvrelay deploy aws plan|apply|status|destroy`."""

from types import SimpleNamespace

from kvrelay.cli.command import Command
from kvrelay.cli.flags import Flag, boolean, choice, existing_file, integer, text

_ACTIONS = ("plan", "apply", "status", "destroy")


def _stack_name(value: str) -> str:
    """It becomes part of a DNS name, a bucket's name and an Auto Scaling group's."""
    plain = value.isascii() and value.replace("-", "").isalnum() and value == value.lower()
    if not plain or not value[0].isalpha() or value.endswith("-") or len(value) > 24:
        raise ValueError("must be at most 24 small letters, digits and dashes, a letter first")
    return value


_WHAT = (
    Flag("platform", "where to: aws", choice("aws"), metavar="PLATFORM", required=True),
    Flag("action", "|".join(_ACTIONS), choice(*_ACTIONS), metavar="ACTION", required=True),
)

_STACK = (
    Flag("--stack", "name of the stack, and of the cluster in it", _stack_name, "kvrelay", "stack",
         "NAME"),
    Flag("--region", "AWS region; else the one that AWS's own settings name", text, None, "stack",
         "REGION"),
    Flag("--vpc", "where it is put", text, None, "stack", "ID"),
    Flag("--router-subnets", "two or more, in different zones; repeatable", text, (), "stack", "ID",
         repeated=True),
    Flag("--worker-subnets", "that reach ECR, S3 and Secrets Manager; repeatable", text, (),
         "stack", "ID", repeated=True),
    Flag("--assign-public-ip", "for Fargate tasks in subnets without NAT gateway", boolean, False,
         "stack", switch=True),
)  # fmt: skip

_WORKLOAD = (
    Flag("--router-image", "container image", text, None, "workload", "IMAGE"),
    Flag("--worker-image", "container image", text, None, "workload", "IMAGE"),
    Flag("--model-uri", "s3://BUCKET/PREFIX of the weights; none: a bucket is made for them", text,
         "", "workload", "URI"),
    Flag("--capacity", "GPU instances, or workers without GPU on Fargate",
         choice("gpu", "fargate"), "gpu", "workload", "gpu|fargate"),
    Flag("--instance-type", "of a GPU instance; one worker runs on each", text, "g5.xlarge",
         "workload", "TYPE"),
    Flag("--worker-cpu", "CPU units of a worker, 1024 for one vCPU", integer(256), 4096, "workload",
         "UNITS"),
    Flag("--worker-memory", "of a worker, in MiB", integer(512), 14336, "workload", "MIB"),
)  # fmt: skip

_POOLS = (
    Flag("--min-prefill", "prefill workers when nobody asks", integer(0, 64), 0, "pools", "N"),
    Flag("--max-prefill", "prefill workers at most", integer(1, 64), 1, "pools", "N"),
    Flag("--min-decode", "decode workers when nobody asks", integer(0, 64), 0, "pools", "N"),
    Flag("--max-decode", "decode workers at most", integer(1, 64), 1, "pools", "N"),
)

_ACCESS = (
    Flag("--scheme", "who can route to the load balancer", choice("internal", "internet-facing"),
         "internal", "access", "internal|internet-facing"),
    Flag("--allowed-cidr", "addresses that may connect", text, "10.0.0.0/8", "access", "CIDR"),
    Flag("--certificate-arn", "certificate of ACM; none serves plain HTTP", text, "", "access",
         "ARN"),
    Flag("--alarm-topic-arn", "SNS topic that alarms notify", text, "", "access", "ARN"),
)  # fmt: skip

_DOING = (
    Flag("--prices", "prices to plan with instead of ours (JSON)", existing_file, None, "action",
         "FILE"),
    Flag("--yes", "destroy without asking", boolean, False, "action", switch=True),
    Flag("--delete-models", "destroy the model bucket too, with what is in it", boolean, False,
         "action", switch=True),
)  # fmt: skip


def _run(values: SimpleNamespace) -> int:
    from kvrelay.cli.deploy_aws import run_deploy

    return run_deploy(values)


DEPLOY = Command(
    "deploy",
    "Run kvrelay on AWS: a router that is always up, and two pools that scale to zero.",
    (*_WHAT, *_STACK, *_WORKLOAD, *_POOLS, *_ACCESS, *_DOING),
    _run,
    epilog="plan calls nothing and prints what apply would make and what that costs per hour.\n"
    "apply and destroy may be run again after a crash. docs/deploy/aws.md has the rest.",
)
