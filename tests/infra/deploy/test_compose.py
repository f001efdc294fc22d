"""The compose stack, held to what the commands read and to what the other files say."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cli_flags import parse

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "infra" / "compose"
OBSERVABILITY = ROOT / "infra" / "observability"
KVRELAY = ("router", "prefill-cpu", "decode-cpu", "prefill-gpu", "decode-gpu")


@pytest.fixture(scope="module")
def compose():
    return yaml.safe_load((FOLDER / "compose.yaml").read_text())


def load(name):
    return yaml.safe_load((OBSERVABILITY / name).read_text())


def plain(value):
    """What Compose makes of `${NAME:-default}` where nothing is set."""
    text = str(value)
    if not text.startswith("${"):
        return text
    name, _, default = text[2:-1].partition(":")
    return default[1:] if default.startswith("-") else f"a-{name}"


def test_it_follows_the_compose_specification():
    checker = Path(sys.executable).with_name("check-jsonschema")
    file = FOLDER / "compose.yaml"
    ran = subprocess.run(
        [checker, "--builtin-schema", "vendor.compose-spec", file],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout


@pytest.mark.parametrize("name", KVRELAY)
def test_a_container_is_started_with_settings_that_the_command_has(compose, name):
    service = compose["services"][name]
    environ = {key: plain(value) for key, value in service["environment"].items()}
    values = parse(service["command"], environ)
    assert values["join_token"]
    # Docker kills what is still there after the grace.
    assert int(service["stop_grace_period"].removesuffix("s")) > values["drain_grace"] + 5


def test_the_example_names_every_variable_that_the_stack_reads(compose):
    text = (FOLDER / "compose.yaml").read_text()
    read = {part.split("}")[0].partition(":")[0] for part in text.split("${")[1:]}
    lines = (FOLDER / ".env.example").read_text().splitlines()
    named = {line.partition("=")[0] for line in lines if "=" in line and line[0] != "#"}
    assert read == named


def test_workers_dial_the_port_that_the_router_opens(compose):
    services = compose["services"]
    router = parse(services["router"]["command"], {})
    for name in KVRELAY[1:]:
        assert services[name]["environment"]["KVRELAY_JOIN"] == f"router:{router['join_port']}"
        assert "kv" in services[name]["networks"]
        assert services[name]["depends_on"] == {"router": {"condition": "service_healthy"}}


def test_each_profile_is_a_whole_fleet(compose):
    for profile in ("cpu", "gpu"):
        roles = sorted(
            service["command"][0]
            for service in compose["services"].values()
            if profile in service.get("profiles", [])
        )
        assert roles == ["decode", "prefill"]


def test_kvrelays_containers_have_no_privileges_and_nothing_listens_to_the_world(compose):
    for name in KVRELAY:
        service = compose["services"][name]
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
    published = [p for s in compose["services"].values() for p in s.get("ports", [])]
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_only_router_workers_and_collector_are_on_the_kv_network(compose):
    on_it = {n for n, s in compose["services"].items() if "kv" in s["networks"]}
    assert on_it == {*KVRELAY, "otel-collector"}
    assert all(compose["services"][name]["networks"] == ["kv"] for name in KVRELAY[1:])


def test_what_is_mounted_exists(compose):
    volumes = [v for s in compose["services"].values() for v in s.get("volumes", [])]
    files = [v.split(":")[0] for v in volumes if v.startswith("../")]
    assert len(files) == 7
    assert all((FOLDER / file).exists() for file in files)


def test_images_of_others_are_pinned(compose):
    foreign = [s["image"] for n, s in compose["services"].items() if n not in KVRELAY]
    assert all(image.rpartition(":")[2][0] in "v0123456789" for image in foreign)


def test_spans_go_from_worker_to_collector_to_tempo_to_grafana(compose):
    endpoint = compose["services"]["router"]["environment"]["OTEL_EXPORTER_OTLP_ENDPOINT"]
    collector, tempo = load("collector.yaml"), load("tempo.yaml")
    listens = collector["receivers"]["otlp"]["protocols"]["http"]["endpoint"]
    assert endpoint == f"http://otel-collector:{listens.rpartition(':')[2]}"
    receives = tempo["distributor"]["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"]
    assert collector["exporters"]["otlp"]["endpoint"] == f"tempo:{receives.rpartition(':')[2]}"
    pipeline = collector["service"]["pipelines"]["traces"]
    assert set(pipeline["receivers"]) <= set(collector["receivers"])
    assert set(pipeline["processors"]) <= set(collector["processors"])
    assert set(pipeline["exporters"]) <= set(collector["exporters"])
    urls = {d["type"]: d["url"] for d in load("grafana/datasources/kvrelay.yaml")["datasources"]}
    assert urls["tempo"] == f"http://tempo:{tempo['server']['http_listen_port']}"


def test_prometheus_scrapes_the_router_and_shares_a_network_with_it(compose):
    services = compose["services"]
    (job,) = load("prometheus.yaml")["scrape_configs"]
    port = parse(services["router"]["command"], {})["port"]
    assert job["static_configs"] == [{"targets": [f"router:{port}"]}]
    assert set(services["prometheus"]["networks"]) & set(services["router"]["networks"])


def test_grafana_finds_the_dashboards_where_they_are_mounted(compose):
    (provider,) = load("grafana/dashboards/kvrelay.yaml")["providers"]
    mounts = [v.split(":")[1] for v in compose["services"]["grafana"]["volumes"]]
    assert any(mount.startswith(provider["options"]["path"]) for mount in mounts)
