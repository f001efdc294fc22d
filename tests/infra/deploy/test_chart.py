"""The Helm chart: what a cluster is sent, object by object, for every values file that we ship."""

import re

import pytest
import yaml
from cli_flags import parse
from helm_library import CHART, EXAMPLES, HelmError, example_values

CERTIFICATES = ("--tls-cert", "--tls-key", "--join-tls-cert", "--join-tls-key", "--join-tls-ca",
                "--router-ca", "--router-cert", "--router-key")  # fmt: skip
VARIANTS = {
    "defaults": {},
    "keda": {"keda": {"enabled": True}, "model": {"servedName": "m"}},
    "three routers": {"router": {"replicas": 3}, "keda": {"enabled": True}},
    "no policies": {
        "networkPolicy": {"enabled": False},
        "podDisruptionBudget": {"enabled": False},
    },
    "hub": {"model": {"reference": "Qwen/Qwen3-0.6B", "revision": "c" * 40}},
    "s3": {"model": {"reference": "s3://bucket/qwen3"}},
    **example_values(),
}


@pytest.fixture(scope="module", params=VARIANTS)
def objects(helm, request):
    return helm.render(VARIANTS[request.param])


def of_kind(objects, *kinds):
    return [each for each in objects if each["kind"] in kinds]


def pods(objects):
    """Name and pod template of everything that makes pods."""
    return {
        each["metadata"]["name"]: each["spec"]["template"]
        for each in of_kind(objects, "Deployment", "StatefulSet")
    }


def container(template):
    (only,) = template["spec"]["containers"]
    return only


def environment(template):
    """Variables of a container; those from a Secret or a field by a value they could have."""
    given = container(template)["env"]
    return {each["name"]: each.get("value", "from-elsewhere") for each in given}


def settings(template):
    return parse(container(template)["args"], environment(template), files=CERTIFICATES)


def selects(selector, labels):
    return selector.items() <= labels.items()


def test_helm_finds_nothing_to_complain_about(helm):
    assert '"Errors":null' in helm.lint()


def test_every_container_is_started_with_flags_and_variables_that_the_command_has(objects):
    for template in pods(objects).values():
        settings(template)


def test_the_router_decides_within_what_keda_may_do(objects):
    (routers,) = of_kind(objects, "StatefulSet")
    given = dict(a.partition("=")[::2] for a in container(routers["spec"]["template"])["args"])
    scaled = {
        s["spec"]["scaleTargetRef"]["name"]: s["spec"] for s in of_kind(objects, "ScaledObject")
    }
    assert ("--scaler-port" in given) == bool(scaled)
    for name, spec in scaled.items():
        pool = name.removeprefix("kvrelay-")
        bounds = f"{spec['minReplicaCount']}:{spec['maxReplicaCount']}"
        assert given[f"--scale-{pool}"] == bounds


def test_no_container_inherits_addresses_of_services_as_settings(objects):
    """A Service called kvrelay would set KVRELAY_PORT, which is `--port`."""
    assert all(t["spec"]["enableServiceLinks"] is False for t in pods(objects).values())


def test_controllers_select_their_own_pods_and_no_others(objects):
    templates = pods(objects)
    for each in of_kind(objects, "Deployment", "StatefulSet"):
        selector = each["spec"]["selector"]["matchLabels"]
        chosen = [n for n, t in templates.items() if selects(selector, t["metadata"]["labels"])]
        assert chosen == [each["metadata"]["name"]]


def test_services_budgets_and_policies_select_pods_that_exist(objects):
    labels = [t["metadata"]["labels"] for t in pods(objects).values()]
    selectors = [each["spec"]["selector"] for each in of_kind(objects, "Service")]
    selectors += [
        each["spec"]["selector"]["matchLabels"] for each in of_kind(objects, "PodDisruptionBudget")
    ]
    for policy in of_kind(objects, "NetworkPolicy"):
        spec = policy["spec"]
        rules = [*spec.get("ingress", []), *spec.get("egress", [])]
        peers = [p for rule in rules for p in rule.get("from", []) + rule.get("to", [])]
        selectors.append(spec["podSelector"]["matchLabels"])
        selectors += [p["podSelector"]["matchLabels"] for p in peers if "podSelector" in p]
    assert all(any(selects(s, each) for each in labels) for s in selectors)


def test_named_ports_exist_and_are_those_the_router_listens_on(objects):
    template = pods(objects)["kvrelay-router"]
    ports = {each["name"]: each["containerPort"] for each in container(template)["ports"]}
    listens = settings(template)
    assert ports["http"] == listens["port"]
    assert ports["join"] == listens["join_port"]
    named = [p["targetPort"] for s in of_kind(objects, "Service") for p in s["spec"]["ports"]]
    for policy in of_kind(objects, "NetworkPolicy"):
        rules = policy["spec"].get("ingress", []) + policy["spec"].get("egress", [])
        named += [p["port"] for rule in rules for p in rule["ports"] if isinstance(p["port"], str)]
    assert set(named) <= set(ports)


def test_workers_dial_every_router_by_a_name_that_its_statefulset_gives_it(objects):
    (routers,) = of_kind(objects, "StatefulSet")
    service = routers["spec"]["serviceName"]
    (headless,) = [s for s in of_kind(objects, "Service") if s["metadata"]["name"] == service]
    assert headless["spec"]["clusterIP"] == "None"
    assert headless["spec"]["publishNotReadyAddresses"] is True
    expected = {
        f"kvrelay-router-{index}.{service}.serving.svc.cluster.local:8001"
        for index in range(routers["spec"]["replicas"])
    }
    for name, template in pods(objects).items():
        if name != "kvrelay-router":
            assert set(settings(template)["join"].split(",")) == expected


def test_a_router_without_workers_is_still_ready(objects):
    """/health is 503 without a decode worker; a probe of it would cut off what wakes the pool."""
    probes = container(pods(objects)["kvrelay-router"])
    assert probes["readinessProbe"]["httpGet"]["path"] == "/metrics"
    assert probes["livenessProbe"]["httpGet"]["path"] == "/metrics"


def test_probes_speak_what_the_router_speaks(objects):
    template = pods(objects)["kvrelay-router"]
    scheme = "HTTPS" if any("--tls-cert" in a for a in container(template)["args"]) else "HTTP"
    for probe in ("readinessProbe", "livenessProbe"):
        assert container(template)[probe]["httpGet"]["scheme"] == scheme


def test_no_probe_kills_a_worker_that_loads(objects):
    workers = [t for n, t in pods(objects).items() if n != "kvrelay-router"]
    assert workers
    assert all("livenessProbe" not in container(t) for t in workers)


def test_pods_are_given_longer_than_their_drain_takes(objects):
    for template in pods(objects).values():
        stop = container(template).get("lifecycle", {}).get("preStop", {})
        before = int(stop.get("exec", {"command": ["sleep", "0"]})["command"][1])
        needed = settings(template)["drain_grace"] + before + 5
        assert template["spec"]["terminationGracePeriodSeconds"] > needed


def test_pods_run_without_privileges_and_write_to_volumes_alone(objects):
    for template in pods(objects).values():
        spec, inner = template["spec"], container(template)
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert inner["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        mounted = {mount["name"] for mount in inner["volumeMounts"]}
        assert mounted == {volume["name"] for volume in spec["volumes"]}
        assert {"/cache", "/tmp"} <= {m["mountPath"] for m in inner["volumeMounts"]}


def test_secrets_are_in_no_argument(objects):
    for template in pods(objects).values():
        assert not any(
            word in argument
            for argument in container(template)["args"]
            for word in ("--join-token", "--api-key")
        )
        assert "KVRELAY_JOIN_TOKEN" in environment(template)


def test_certificates_are_mounted_where_the_flags_look(objects):
    for template in pods(objects).values():
        paths = [a.partition("=")[2] for a in container(template)["args"] if "=/etc/kvrelay/" in a]
        folders = {m["mountPath"] for m in container(template)["volumeMounts"]}
        assert {path.rpartition("/")[0] for path in paths} <= folders


def test_workers_never_see_the_routers_key(helm):
    objects = helm.render(VARIANTS["eks-efa"])
    for name, template in pods(objects).items():
        if name == "kvrelay-router":
            continue
        (volume,) = [
            v for v in template["spec"]["volumes"]
            if v.get("secret", {}).get("secretName") == "kvrelay-join-tls"
        ]  # fmt: skip
        assert volume["secret"]["items"] == [{"key": "ca.crt", "path": "ca.crt"}]


def test_what_keda_scales_has_no_other_writer_of_its_replicas(objects):
    scaled = {s["spec"]["scaleTargetRef"]["name"] for s in of_kind(objects, "ScaledObject")}
    deployments = {d["metadata"]["name"]: d["spec"] for d in of_kind(objects, "Deployment")}
    assert scaled <= set(deployments)
    for name, spec in deployments.items():
        assert ("replicas" in spec) != (name in scaled)


def test_keda_asks_every_router_about_the_pool_it_scales(objects):
    (routers,) = of_kind(objects, "StatefulSet")
    for scaled in of_kind(objects, "ScaledObject"):
        triggers = scaled["spec"]["triggers"]
        assert {t["type"] for t in triggers} == {"external-push"}
        pool = scaled["spec"]["scaleTargetRef"]["name"].removeprefix("kvrelay-")
        assert {t["metadata"]["pool"] for t in triggers} == {pool}
        hosts = [t["metadata"]["scalerAddress"].partition(".")[0] for t in triggers]
        assert hosts == [f"kvrelay-router-{n}" for n in range(routers["spec"]["replicas"])]
        ports = {t["metadata"]["scalerAddress"].partition(":")[2] for t in triggers}
        args = container(routers["spec"]["template"])["args"]
        assert [f"--scaler-port={port}" for port in ports] == [
            a for a in args if a.startswith("--scaler-port")
        ]


def test_the_policy_opens_the_ports_that_ucx_is_held_to(objects):
    policies = {p["metadata"]["name"]: p["spec"] for p in of_kind(objects, "NetworkPolicy")}
    if "kvrelay-worker" not in policies:
        return
    for name, template in pods(objects).items():
        if name == "kvrelay-router":
            continue
        first, last = environment(template)["UCX_TCP_PORT_RANGE"].split("-")
        opened = [(p["port"], p["endPort"]) for rule in policies["kvrelay-worker"]["ingress"]
                  for p in rule["ports"]]  # fmt: skip
        one_pool = "kvrelay-prefill" not in pods(objects)
        assert opened == ([] if one_pool else [(int(first), int(last))])


def test_two_pools_never_fall_back_to_another_fabric(helm):
    for fabric, expected in (("tcp", "tcp"), ("rdma", "rc,dc,srd")):
        for template in pods(helm.render({"fabric": {"class": fabric}})).values():
            if container(template)["args"][0] != "router":
                assert settings(template)["require_transport"] == expected


def test_without_a_fabric_there_is_one_pool(helm):
    found = pods(helm.render({"fabric": {"class": "none"}}))
    assert set(found) == {"kvrelay-router", "kvrelay-decode"}
    # Nor is time spent on asking a peer that can't be reached.
    assert settings(found["kvrelay-decode"])["weights_from"] == "store"


def test_gpus_are_asked_for_in_requests_and_limits_alike(helm):
    resources = container(pods(helm.render(VARIANTS["eks-efa"]))["kvrelay-decode"])["resources"]
    for name in ("nvidia.com/gpu", "vpc.amazonaws.com/efa", "hugepages-2Mi"):
        assert resources["requests"][name] == resources["limits"][name]
    on_cpu = container(pods(helm.render(VARIANTS["cpu"]))["kvrelay-decode"])
    assert not any("gpu" in name for name in on_cpu["resources"]["limits"])
    assert "--device=cpu" in on_cpu["args"]


def test_the_token_is_made_by_the_chart_and_is_not_twice_the_same(helm):
    tokens = [of_kind(helm.render({}), "Secret")[0]["data"]["token"] for _ in range(2)]
    assert tokens[0] != tokens[1]
    assert len(tokens[0]) > 40
    assert not of_kind(helm.render({"join": {"existingSecret": "mine"}}), "Secret")


def test_the_service_monitor_finds_one_service(helm):
    objects = helm.render(VARIANTS["eks-efa"])
    (monitor,) = of_kind(objects, "ServiceMonitor")
    wanted = monitor["spec"]["selector"]["matchLabels"]
    found = [
        s for s in of_kind(objects, "Service") if selects(wanted, s["metadata"]["labels"])
    ]  # fmt: skip
    assert [s["metadata"]["name"] for s in found] == ["kvrelay"]
    assert monitor["spec"]["endpoints"][0]["port"] in {p["name"] for p in found[0]["spec"]["ports"]}


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"model": {"reference": "Qwen/Qwen3-0.6B"}}, "no commit of Qwen/Qwen3-0.6B"),
        ({"model": {"reference": "Qwen/Qwen3-0.6B", "revision": "main"}}, '"main" is no commit'),
        (
            yaml.safe_load((EXAMPLES / "eks-efa.yaml").read_text()),
            "no commit of meta-llama/Llama-3.1-8B-Instruct",
        ),
        ({"model": {"reference": "/models/a"}}, '/models/a" is on no volume'),
        ({"image": {"router": {"tag": "latest"}}}, "tag"),
        ({"fabric": {"class": "infiniband"}}, "class"),
        ({"workers": {"gpus": 2}}, "gpus"),
        ({"tls": {"join": {"mutual": True}}}, "tls.join.mutual needs"),
        ({"ingress": {"enabled": True}}, "ingress.host"),
        ({"router": {"extraArgs": ["-v"]}}, "extraArgs"),
    ],
)
def test_values_that_can_not_work_are_refused_by_name(helm, values, complaint):
    with pytest.raises(HelmError, match=re.escape(complaint)):
        helm.render(values)


def test_a_mutable_revision_can_be_asked_for(helm):
    model = {"reference": "Qwen/Qwen3-0.6B", "revision": "main", "allowMutableRevision": True}
    template = pods(helm.render({"model": model}))["kvrelay-decode"]
    assert settings(template)["revision"] == "main"


def test_another_release_name_is_in_every_name(helm):
    objects = helm.render({"keda": {"enabled": True}}, release="blue")
    assert all(o["metadata"]["name"].startswith("blue-kvrelay") for o in objects)


def test_the_notes_warn_of_what_is_open(helm):
    notes = helm.notes({})
    assert "anybody who reaches the router may use it" in notes
    assert "plain text" in notes
    notes = helm.notes(VARIANTS["eks-efa"])
    assert "WARNING" not in notes
    assert "it asks the routers at port 50052" in notes


def test_the_chart_is_of_the_products_version():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = (CHART.parents[2] / "pyproject.toml").read_text()
    assert chart["appVersion"] == re.search(r'^version = "(.+)"', project, re.MULTILINE)[1]
