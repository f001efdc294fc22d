"""What `plan` says before anything is done: all of the template, and honest sums."""

import json
from dataclasses import replace

import pytest
import yaml

from kvrelay_infra.providers import Pool
from kvrelay_infra.providers.aws import DeploySettings, load_prices, make_plan
from kvrelay_infra.providers.aws.plan import template
from kvrelay_infra.providers.aws.settings import PoolSize
from kvrelay_protocol.errors import UsageError

SETTINGS = DeploySettings(
    stack="kvrelay",
    region="us-east-1",
    vpc="vpc-1",
    router_subnets=("subnet-1", "subnet-2"),
    worker_subnets=("subnet-1",),
    router_image="router",
    worker_image="worker",
    pools={Pool.PREFILL: PoolSize(0, 2), Pool.DECODE: PoolSize(1, 4)},
    model_uri="s3://ours/llama",
)


def parsed_template():
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("!", lambda loader, tag, node: None)
    return yaml.load(template(), Loader)  # noqa: S506 - a SafeLoader of our own


@pytest.mark.parametrize("capacity", ["gpu", "fargate"])
def test_it_lists_every_resource_of_the_template(capacity):
    expected = {
        (item["Type"], name)
        for name, item in parsed_template()["Resources"].items()
        if capacity == "gpu" or "Condition" not in item
    }
    plan = make_plan(replace(SETTINGS, capacity=capacity), load_prices())
    assert set(plan.resources) == expected
    assert len(plan.resources) == len(expected)


def test_a_bucket_is_listed_where_one_is_made():
    plan = make_plan(replace(SETTINGS, model_uri=""), load_prices())
    assert plan.resources[-1] == (
        "AWS::S3::Bucket (kept by destroy)",
        "kvrelay-models-ACCOUNT-us-east-1",
    )


def test_at_zero_no_worker_costs_anything():
    prices = replace(load_prices(), instance_hour={"g5.xlarge": 2.0}, disk_gib_month=0.0)
    total = make_plan(SETTINGS, prices).total
    assert total.at_min - total.at_zero == pytest.approx(2.0)
    assert total.at_max - total.at_zero == pytest.approx(12.0)
    workers = [line for line in make_plan(SETTINGS, prices).costs if " x " in line.what]
    assert [line.at_zero for line in workers] == [0.0, 0.0]


def test_what_is_always_there_costs_at_zero_too():
    prices = load_prices()
    plan = make_plan(replace(SETTINGS, scheme="internet-facing", certificate_arn="arn"), prices)
    expected = (
        prices.fargate_vcpu_hour + 2 * prices.fargate_gib_hour + prices.load_balancer_hour
        + 2 * prices.public_ipv4_hour
        + (2 * prices.secret_month + 3 * prices.alarm_month + prices.private_zone_month) / 730
    )  # fmt: skip
    assert plan.total.at_zero == pytest.approx(expected)


def test_workers_without_gpu_cost_cpu_and_memory():
    prices = load_prices()
    fargate = replace(SETTINGS, capacity="fargate", worker_cpu=2048, worker_memory=8192)
    total = make_plan(fargate, prices).total
    each = 2 * prices.fargate_vcpu_hour + 8 * prices.fargate_gib_hour
    assert total.at_max - total.at_zero == pytest.approx(6 * each)


def test_an_instance_without_a_price_is_an_error_that_names_the_way_out():
    with pytest.raises(UsageError, match=r"p9\.huge has no price.*--prices FILE"):
        make_plan(replace(SETTINGS, instance_type="p9.huge"), load_prices())


def test_prices_come_from_a_file_of_ones_own(tmp_path):
    shipped = load_prices()
    mine = {name: getattr(shipped, name) for name in shipped.__slots__}
    path = tmp_path / "prices.json"
    path.write_text(json.dumps(mine | {"instance_hour": {"p9.huge": 9.0}}))
    assert load_prices(path).instance_hour == {"p9.huge": 9.0}
    path.write_text('{"as_of": "today"}')
    with pytest.raises(UsageError, match="must be a JSON object of note, as_of"):
        load_prices(path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"pools": {Pool.PREFILL: PoolSize(0, 1), Pool.DECODE: PoolSize(3, 2)}},
         "--min-decode 3 is above --max-decode 2"),
        ({"router_subnets": ("subnet-1",)}, "--router-subnets has 1: a load balancer needs 2"),
        ({"scheme": "internet-facing"}, "without --certificate-arn would send API keys"),
        ({"model_uri": "http://x"}, "--model-uri http://x: must begin with s3://"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_one_line(change, text):
    with pytest.raises(UsageError, match=text):
        replace(SETTINGS, **change)


def test_every_parameter_that_is_set_is_one_of_the_template():
    given = SETTINGS.parameters(dict.fromkeys(Pool, 1), "ours")
    known = parsed_template()["Parameters"]
    assert set(given) <= set(known)
    assert {name for name, item in known.items() if "Default" not in item} <= set(given)


def test_cfn_lint_has_no_objection():
    from cfnlint.api import lint

    assert [str(match) for match in lint(template(), regions=["us-east-1", "eu-central-1"])] == []
