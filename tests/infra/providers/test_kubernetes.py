"""The Kubernetes provider against an API server that answers over HTTP."""

import pytest
import urllib3
from fake_kubernetes import Cluster, Fault
from kubernetes import client

from kvrelay_infra.providers import Pool, PoolStatus
from kvrelay_infra.providers.kubernetes import KubernetesProvider
from kvrelay_protocol import errors

PREFILL, DECODE = "kvrelay-prefill", "kvrelay-decode"
NAMES = {Pool.PREFILL: PREFILL, Pool.DECODE: DECODE}


@pytest.fixture
def cluster():
    cluster = Cluster()
    for name in NAMES.values():
        cluster.add(name)
    return cluster


@pytest.fixture
async def provider(cluster):
    with cluster.serving() as url:
        settings = client.Configuration(host=url)
        settings.retries = urllib3.Retry(total=1)
        provider = KubernetesProvider(
            client.ApiClient(settings), namespace="llm", deployments=NAMES
        )
        yield provider
        await provider.close()


def writes(cluster):
    return [path for method, path in cluster.requests if method != "GET"]


async def test_both_pools_go_from_zero_to_many_and_back(provider, cluster):
    for replicas in (1, 5, 0):
        for pool, name in NAMES.items():
            await provider.scale(pool, replicas)
            assert cluster.replicas(name) == replicas
    assert {path.rsplit("/", 1)[1] for path in writes(cluster)} == {"scale"}


async def test_a_number_that_is_set_already_is_not_written(provider, cluster):
    await provider.scale(Pool.DECODE, 3)
    await provider.scale(Pool.DECODE, 3)
    assert len(writes(cluster)) == 1


async def test_a_negative_number_reaches_nobody(provider, cluster):
    with pytest.raises(ValueError, match="replicas=-1"):
        await provider.scale(Pool.DECODE, -1)
    assert cluster.requests == []


async def test_a_write_in_between_is_read_again(provider, cluster):
    def other():
        cluster.before_write = None
        cluster.write(DECODE, 7)

    cluster.before_write = other
    await provider.scale(Pool.DECODE, 2)
    assert cluster.replicas(DECODE) == 2
    assert len(writes(cluster)) == 2


async def test_one_who_writes_all_the_time_is_a_second_writer(provider, cluster):
    cluster.before_write = lambda: cluster.write(DECODE, 7)
    with pytest.raises(errors.SecondWriter, match="because something else wrote it 5 times"):
        await provider.scale(Pool.DECODE, 2)
    assert cluster.replicas(DECODE) == 7


def _target(name):
    return {"kind": "Deployment", "name": name, "apiVersion": "apps/v1"}


@pytest.mark.parametrize("kind", ["ScaledObject", "HorizontalPodAutoscaler"])
async def test_a_deployment_that_somebody_scales_is_refused_and_the_other_is_not(
    provider, cluster, kind
):
    owner = {"metadata": {"name": "owner"},
             "spec": {"scaleTargetRef": _target(DECODE), "maxReplicas": 3}}  # fmt: skip
    if kind == "ScaledObject":
        cluster.scaledobjects = [owner]
    else:
        cluster.hpas = [owner]
    with pytest.raises(errors.SecondWriter) as caught:
        await provider.scale(Pool.DECODE, 2)
    assert f"not scaled to 2, because {kind} owner sets its replicas" in str(caught.value)
    assert writes(cluster) == []
    await provider.scale(Pool.PREFILL, 2)
    assert cluster.replicas(PREFILL) == 2


@pytest.mark.parametrize("carried_out", [False, True])
async def test_a_reset_connection_is_dialled_again(provider, cluster, carried_out):
    cluster.faults = [Fault("PUT", carried_out=carried_out)]
    await provider.scale(Pool.DECODE, 2)
    assert cluster.replicas(DECODE) == 2
    assert not cluster.faults


@pytest.mark.parametrize(
    ("fault", "error", "text"),
    [
        (Fault("PUT", 403, "cannot update deployments/scale"), errors.ProviderDenied,
         "kubernetes: deployment kvrelay-decode in namespace llm: cannot update deployments/scale"),
        (Fault("GET", 401, "Unauthorized"), errors.ProviderDenied, "check the service account"),
        (Fault("GET", 403, "cannot list scaledobjects"), errors.ProviderDenied, "scaledobjects"),
        (Fault("PUT", 403, "forbidden: exceeded quota: gpus"), errors.ProviderQuota, "quota"),
        (Fault("PUT", 500, "etcd"), errors.ProviderUnreachable, "answered 500: etcd"),
    ],
)  # fmt: skip
async def test_a_refusal_is_one_line(provider, cluster, fault, error, text):
    cluster.faults = [fault]
    with pytest.raises(error, match=text) as caught:
        await provider.scale(Pool.DECODE, 2)
    assert "\n" not in str(caught.value)
    assert cluster.replicas(DECODE) == 0


async def test_a_deployment_that_is_not_there_is_named(provider, cluster):
    del cluster.deployments[DECODE]
    with pytest.raises(errors.ProviderMissing, match="kvrelay-decode in namespace llm does not"):
        await provider.scale(Pool.DECODE, 1)


async def test_a_server_that_resets_every_connection_is_unreachable(provider, cluster):
    cluster.faults = [Fault("GET") for _ in range(4)]
    with pytest.raises(errors.ProviderUnreachable, match="does not answer") as caught:
        await provider.scale(Pool.DECODE, 1)
    assert f":{cluster.port}" in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_pools_are_described_with_what_keeps_them_waiting(provider, cluster):
    cluster.add(PREFILL, replicas=2, ready=2)
    cluster.add(DECODE, replicas=4, ready=1)
    for _ in range(2):
        cluster.add_pod(DECODE, {"conditions": [
            {"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
             "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."}]})  # fmt: skip
    waiting = {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}
    cluster.add_pod(DECODE, {"containerStatuses": [
        {"name": "worker", "image": "x", "imageID": "", "ready": False, "restartCount": 0,
         "state": {"waiting": waiting}}]})  # fmt: skip
    cluster.add_pod(DECODE, {"conditions": [{"type": "PodScheduled", "status": "True"}]})
    assert await provider.describe() == {
        Pool.PREFILL: PoolStatus(2, 2, 0),
        Pool.DECODE: PoolStatus(
            4, 1, 3,
            "2 x Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu.; "
            "ImagePullBackOff: Back-off pulling image",
        ),
    }  # fmt: skip


async def test_pods_that_were_never_created_are_explained_too(provider, cluster):
    cluster.add(DECODE, replicas=1)
    cluster.deployments[DECODE]["status"]["conditions"] = [
        {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate",
         "message": 'pods "x" is forbidden: exceeded quota: gpus'}]  # fmt: skip
    described = await provider.describe()
    assert described[Pool.DECODE].reason == (
        'FailedCreate: pods "x" is forbidden: exceeded quota: gpus'
    )


def test_without_credentials_it_says_so(monkeypatch, tmp_path):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr(
        "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none")
    )
    with pytest.raises(errors.ProviderDenied, match="neither a service account nor a kubeconfig"):
        KubernetesProvider.connect(namespace="llm", deployments=NAMES)
