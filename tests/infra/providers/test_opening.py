"""A provider from one line, as the containers' environment has it."""

import re

import pytest
from fake_kubernetes import Cluster

from kvrelay_infra.providers import Pool, open_provider
from kvrelay_infra.providers.aws.plan import template
from kvrelay_protocol.errors import ProviderUnreachable, UsageError


async def test_the_line_in_the_aws_template_opens_its_two_services(aws, monkeypatch):
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    [line] = re.findall(r'Name: KVRELAY_PROVIDER, Value: !Sub "(.+)"', template())
    provider = open_provider(line.replace("${AWS::StackName}", "kvr"))
    ecs = aws.client("ecs")
    ecs.create_cluster(clusterName="kvr")
    ecs.register_task_definition(
        family="worker", containerDefinitions=[{"name": "worker", "image": "x", "memory": 1}]
    )
    for name in ("kvr-prefill", "kvr-decode"):
        ecs.create_service(cluster="kvr", serviceName=name, taskDefinition="worker", desiredCount=0)
    await provider.scale(Pool.DECODE, 2)
    described = await provider.describe()
    assert {pool: status.desired for pool, status in described.items()} == {
        Pool.PREFILL: 0,
        Pool.DECODE: 2,
    }
    await provider.close()


async def test_a_namespace_is_reached_through_the_kubeconfig(monkeypatch, tmp_path):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    cluster = Cluster()
    cluster.add("p")
    cluster.add("d")
    with cluster.serving() as url:
        path = tmp_path / "config"
        path.write_text(
            "{apiVersion: v1, kind: Config, current-context: c, users: [{name: u, user: {}}], "
            f"clusters: [{{name: k, cluster: {{server: '{url}'}}}}], "
            "contexts: [{name: c, context: {cluster: k, user: u}}]}"
        )
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(path))
        provider = open_provider("kubernetes:llm/p,d")
        await provider.scale(Pool.PREFILL, 1)
        assert (cluster.replicas("p"), cluster.replicas("d")) == (1, 0)
        await provider.close()


def test_without_a_region_it_says_so(monkeypatch):
    for name in ("AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    with pytest.raises(ProviderUnreachable, match="You must specify a region"):
        open_provider("aws:kvr/p,d")


@pytest.mark.parametrize("line", ["", "gcp:x/p,d", "aws:kvr", "aws:kvr/p", "kubernetes:/p,d"])
def test_another_line_is_refused_with_the_two_shapes(line):
    with pytest.raises(UsageError, match="must be aws:CLUSTER/PREFILL,DECODE or kubernetes:"):
        open_provider(line)
