"""Every rendered object against the schema of what would receive it."""

import json
import shutil
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from helm_library import TOOLS, example_values

VARIANTS = {
    "defaults": {},
    "keda": {"keda": {"enabled": True}, "router": {"replicas": 3}},
    **example_values(),
}
CUSTOM = {"ScaledObject", "ServiceMonitor", "PrometheusRule"}
VALIDATOR = Path(__file__).parents[2] / "support" / "custom_resources.mjs"


def check_custom(objects) -> subprocess.CompletedProcess:
    node = shutil.which("node")
    if node is None or not (TOOLS / "npm" / "node_modules" / "@kubernetes-models").is_dir():
        pytest.skip(
            "schemas of KEDA and the Prometheus operator have not been fetched: make infra-test"
        )
    return subprocess.run(
        [node, VALIDATOR, TOOLS / "npm"],
        input=json.dumps(objects), capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def rendered(helm):
    return {name: helm.render(values) for name, values in VARIANTS.items()}


def test_objects_are_what_kubernetes_knows(rendered):
    for objects in rendered.values():
        for each in objects:
            if each["kind"] not in CUSTOM:
                kubernetes_validate.validate(each, "1.37.0", strict=True)


def test_the_oldest_kubernetes_that_the_chart_admits_knows_them_too(rendered):
    for each in rendered["eks-efa"]:
        if each["kind"] not in CUSTOM:
            kubernetes_validate.validate(each, "1.27.0", strict=True)


def test_a_field_that_kubernetes_does_not_know_is_found(rendered):
    service = next(o for o in rendered["defaults"] if o["kind"] == "Service")
    broken = service | {"spec": service["spec"] | {"selektor": {}}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, "1.37.0", strict=True)


def test_custom_resources_are_what_their_operators_know(rendered):
    objects = [o for each in rendered.values() for o in each if o["kind"] in CUSTOM]
    assert {o["kind"] for o in objects} == CUSTOM
    ran = check_custom(objects)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_a_custom_resource_of_a_wrong_type_is_found(rendered):
    scaled = next(o for o in rendered["keda"] if o["kind"] == "ScaledObject")
    broken = scaled | {"spec": scaled["spec"] | {"minReplicaCount": "none"}}
    ran = check_custom([broken])
    assert ran.returncode == 1
    assert "minReplicaCount" in ran.stdout


def test_the_rules_in_the_cluster_are_those_that_promtool_tests(rendered):
    (rule,) = [o for o in rendered["eks-efa"] if o["kind"] == "PrometheusRule"]
    tested = Path(__file__).parents[3] / "infra/helm/kvrelay/files/alerts.yaml"
    assert rule["spec"] == yaml.safe_load(tested.read_text())


def test_the_dashboard_in_the_cluster_is_the_one_in_the_compose_stack(rendered):
    (config,) = [o for o in rendered["eks-efa"] if o["kind"] == "ConfigMap"]
    file = Path(__file__).parents[3] / "infra/helm/kvrelay/files/dashboard.json"
    assert config["data"]["kvrelay.json"] == file.read_text()
