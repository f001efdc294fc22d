"""Argument, environment, default; what a bad value is called; how values travel to children."""

import dataclasses

import pytest

from kvrelay.cli import flags, settings
from kvrelay.cli.commands.shared import ROUTER_FLAGS, STACK_FLAGS, WORKER_FLAGS
from kvrelay.cli.settings import resolve
from kvrelay.cli.stack import defaults
from kvrelay.cli.units import format_count, format_size, parse_duration, parse_size
from kvrelay_engine.runtime.config import WorkerConfig
from kvrelay_protocol.errors import UsageError
from kvrelay_router.config import RouterConfig

MIB = 1024 * 1024


def test_an_argument_beats_the_environment_beats_the_default():
    environ = {"KVRELAY_PORT": "7001", "KVRELAY_KV_MEMORY": "1GiB"}
    values = resolve(STACK_FLAGS, {"port": "7002"}, environ=environ)
    assert (values.port, values.kv_memory, values.prefill) == (7002, 1024 * MIB, 1)


def test_an_empty_variable_counts_as_unset():
    assert resolve(STACK_FLAGS, {}, environ={"KVRELAY_PORT": ""}).port == 8000


def test_every_flag_has_a_variable():
    samples = {"model": "/m", "revision": "main", "served_model_name": "m", "tls_cert": __file__,
               "tls_key": __file__, "log_requests": "1", "api_key": "k", "join_token": "t",
               "host": "::1", "join_host": "::1", "device": "cpu", "dtype": "float32",
               "transport": "ucx", "require_transport": "rc, tcp", "quantization": "int8", "staging_buffers": "2", "kv_memory": "2MiB",
               "staging": "1MiB", "max_body": "1MiB", "weights_from": "store", "share_weights": "disk"}  # fmt: skip
    for flag in STACK_FLAGS:
        text = samples.get(flag.dest, "3")
        value = getattr(resolve(STACK_FLAGS, {}, environ={flag.variable: text}), flag.dest)
        assert value == ((flag.parse(text),) if flag.repeated else flag.parse(text))


def test_api_keys_come_repeated_or_as_a_list():
    assert resolve(STACK_FLAGS, {"api_key": ["a", "b"]}, environ={}).api_key == ("a", "b")
    environ = {"KVRELAY_API_KEY": "a, b"}
    assert resolve(STACK_FLAGS, {}, environ=environ).api_key == ("a", "b")


def test_all_bad_values_are_reported_at_once_with_their_origin():
    given = {"prefill": "-1", "kv_memory": "lots", "lease": "soon", "device": "tpu"}
    environ = {"KVRELAY_PORT": "99999", "KVRELAY_API_KEY": "secret key"}
    with pytest.raises(UsageError) as caught:
        resolve(STACK_FLAGS, given, environ=environ, problems=["unknown flag --x"])
    assert caught.value.message.splitlines() == [
        "unknown flag --x",
        "--prefill -1 must be a whole number from 0 to 64",
        "KVRELAY_PORT=99999 must be a whole number from 0 to 65535",
        "KVRELAY_API_KEY=*** must be printable, without spaces or commas",
        "--device tpu must be cpu, cuda, cuda:N or auto",
        "--kv-memory lots must be a size such as 256MiB or 2GiB",
        "--lease soon must be a time such as 10, 500ms or 2m",
    ]


def test_a_required_flag_names_its_variable_too():
    with pytest.raises(UsageError, match=r"^--join is missing \(or KVRELAY_JOIN\)$"):
        resolve(WORKER_FLAGS, {}, environ={})


def test_values_survive_the_way_to_a_child():
    given = {"port": "7002", "lease": "2m", "log_requests": "true", "kv_memory": "3MiB"}
    values = resolve(STACK_FLAGS, given | {"api_key": ["a", "b"], "model": "m"}, environ={})
    values.supervised = True
    values.provider = "local:/tmp/scale"
    values.scale_decode = flags.Bounds(0, 3)
    arguments = flags.to_arguments(ROUTER_FLAGS, values)
    assert "--log-requests" in arguments
    assert not any("api-key" in argument or "join-token" in argument for argument in arguments)
    environment = flags.to_environment(ROUTER_FLAGS, values)
    hidden = dict.fromkeys(
        (
            "KVRELAY_JOIN_TLS_CERT",
            "KVRELAY_JOIN_TLS_KEY",
            "KVRELAY_JOIN_TLS_CA",
            "KVRELAY_PING_WHILE_STARTING",  # these three `values` does not name
            "KVRELAY_SCALER_PORT",
            "KVRELAY_SCALE_PREFILL",
        ),
        "",
    )
    assert environment == {"KVRELAY_API_KEY": "a,b", "KVRELAY_JOIN_TOKEN": ""} | hidden

    from kvrelay.cli.command import build_parser
    from kvrelay.cli.main import load_command

    parsed = build_parser(load_command("router")).parse_args(["m", *arguments])
    child = resolve(ROUTER_FLAGS, vars(parsed), environ=environment)
    sent = {flag.dest: getattr(values, flag.dest, flag.default) for flag in ROUTER_FLAGS}
    assert vars(child) == sent


def test_defaults_are_those_of_the_configs():
    values = defaults()
    router = {field.name: field.default for field in dataclasses.fields(RouterConfig)}
    worker = {field.name: field.default for field in dataclasses.fields(WorkerConfig)}
    same_name = {"host", "port", "join_host", "join_port", "join_token", "max_queue",
                 "max_replays", "local_prefill_max_tokens", "log_requests"}  # fmt: skip
    for name in same_name:
        assert getattr(values, name) == router[name]
    for name in ("queue_timeout", "request_timeout", "replay_wait", "lease", "heartbeat",
                 "drain_grace"):  # fmt: skip
        assert getattr(values, name) == router[f"{name}_s"]
    for name in ("dtype", "block_size", "max_model_len", "max_batch_tokens", "max_sequences",
                 "transport", "threads", "staging_buffers", "join_token"):  # fmt: skip
        assert getattr(values, name) == worker[name]
    assert values.kv_memory == worker["kv_memory_bytes"]
    assert values.staging == worker["staging_bytes"]
    assert values.max_body == router["max_body_bytes"]
    for name in ("lease", "heartbeat", "drain_grace"):
        assert getattr(values, name) == worker[f"{name}_s"]


@pytest.mark.parametrize(
    ("text", "count"),
    [("1", 1), ("2KiB", 2048), ("1.5 GiB", 1536 * MIB), ("3Mi", 3 * MIB), ("2MB", 2_000_000)],
)
def test_sizes(text, count):
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "MiB", "-1MiB", "1 parsec", "1e9"])
def test_bad_sizes(text):
    with pytest.raises(ValueError, match="must be a size"):
        parse_size(text)


def test_durations_and_numbers_for_people():
    assert [parse_duration(text) for text in ("2", "500ms", "1.5s", "2m")] == [2, 0.5, 1.5, 120]
    assert [format_size(n) for n in (0, 1023, 1024, 256 * MIB, 1536 * MIB)] == [
        "0 B", "1023 B", "1 KiB", "256 MiB", "1.5 GiB",
    ]  # fmt: skip
    assert [format_count(n) for n in (12, 3_140_000, 8e9)] == ["12", "3.14 M", "8 B"]


def test_the_pasted_environment_masks_secrets():
    environ = {
        "KVRELAY_API_KEY": "abc",
        "KVRELAY_MAX_BATCH_TOKENS": "512",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://me:pass@collector:4318",
        "OTEL_EXPORTER_OTLP_HEADERS": "authorization=x",
        "UCX_TLS": "tcp",
        "HOME": "/home/me",
    }
    assert settings.relevant_environment(environ) == [
        ("KVRELAY_API_KEY", "*** (3 characters)"),
        ("KVRELAY_MAX_BATCH_TOKENS", "512"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://***@collector:4318"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "*** (15 characters)"),
        ("UCX_TLS", "tcp"),
    ]


@pytest.mark.parametrize("url", ["garbage", "ftp://x", "http://", "//x", "http:/x"])
def test_a_base_url_is_checked_like_every_flag(url, capsys):
    from kvrelay.cli.main import main

    assert main(["chat", "--base-url", url]) == 2
    assert capsys.readouterr().err == (
        f"kvrelay: --base-url {url} must be a URL such as http://127.0.0.1:8000\n"
    )


@pytest.mark.parametrize("address", ["http://127.0.0.1:8001", "router", "router:", ":1", "r:x"])
def test_a_join_address_is_host_and_port_not_a_url(address, capsys):
    from kvrelay.cli.main import main

    assert main(["decode", "--join", address]) == 2
    assert "must be host:port, such as 10.0.0.7:8001" in capsys.readouterr().err


@pytest.mark.parametrize("joined", ["a:1,b:2", "a:1, b:2 "])
def test_a_worker_may_join_several_routers(joined):
    assert resolve(WORKER_FLAGS, {"join": joined}, environ={}).join == "a:1,b:2"


@pytest.mark.parametrize(
    ("joined", "problem"),
    [("a:1,b", "must be host:port"), ("a:1,", "must be host:port"), ("a:1,a:1", "twice")],
)
def test_every_router_of_a_list_is_checked(joined, problem):
    with pytest.raises(UsageError, match=problem):
        resolve(WORKER_FLAGS, {"join": joined}, environ={})


@pytest.mark.parametrize(
    ("text", "expected"), [("0:3", (0, 3)), ("2", (2, 2)), ("0:0", (0, 0)), ("1:1", (1, 1))]
)
def test_bounds_are_two_numbers_or_one_for_both(text, expected):
    assert flags.bounds(text) == expected
    assert flags.bounds(str(flags.bounds(text))) == expected


@pytest.mark.parametrize("text", ["x", "2:1", "-1:2", "1:", ":1", "1:2:3", "1.5"])
def test_bad_bounds_are_named_with_what_they_must_be(text):
    with pytest.raises(UsageError) as caught:
        resolve(ROUTER_FLAGS, {"scale_decode": text}, environ={})
    (line,) = caught.value.message.splitlines()
    assert line == (f"--scale-decode {text} must be MIN:MAX, whole numbers with 0 <= MIN <= MAX")


@pytest.mark.parametrize(
    "provider",
    ["foo", "foo:x", "local", "local:", "LOCAL:x", "ecs:c/p,d"],
)
def test_an_unknown_provider_is_one_line_that_says_what_there_is(provider):
    from kvrelay.cli.scaling import read_scaling

    values = resolve(ROUTER_FLAGS, {"provider": provider}, environ={})
    with pytest.raises(UsageError) as caught:
        read_scaling(values)
    (line,) = caught.value.message.splitlines()
    assert line.startswith(f"--provider {provider}: must be local:SOCKET, kubernetes:")


def test_two_that_say_how_many_run_are_one_line():
    from kvrelay.cli.scaling import read_scaling

    given = {"provider": "local:x", "scaler_port": "0"}
    with pytest.raises(UsageError, match=r"^--provider local:x and --scaler-port 0: one of them"):
        read_scaling(resolve(ROUTER_FLAGS, given, environ={}))


def test_bounds_that_serve_nothing_are_one_line():
    from kvrelay.cli.scaling import read_scaling

    given = {"provider": "local:x", "scale_decode": "0:0"}
    with pytest.raises(UsageError) as caught:
        read_scaling(resolve(ROUTER_FLAGS, given, environ={}))
    (line,) = caught.value.message.splitlines()
    assert line.startswith("--scale-prefill, --scale-decode: decode.max 0")


@pytest.mark.parametrize("pool", ["prefill", "decode"])
def test_more_that_always_run_than_there_are_is_one_line(pool):
    from kvrelay.cli.stack import on_demand

    given = {"min": "2", "prefill": "2", "decode": "2", pool: "1"}
    with pytest.raises(UsageError) as caught:
        on_demand(resolve(STACK_FLAGS, given, environ={}))
    assert caught.value.message == f"--min 2 is above --{pool} 1; lower it or raise that"


@pytest.mark.parametrize("given", [{}, {"min": "1"}])
def test_a_pool_that_is_never_at_zero_does_not_sleep(given):
    from kvrelay.cli.stack import on_demand

    with pytest.raises(UsageError) as caught:
        on_demand(resolve(STACK_FLAGS, given | {"sleep": "10m"}, environ={}))
    unless = " and not --min 1" if given else ""
    assert caught.value.message == (
        f"--sleep 600 needs --min 0{unless}: a pool sleeps where it would be at zero"
    )


def test_workers_of_this_machine_sleep_for_as_long_as_is_said():
    from kvrelay.cli.scaling import read_scaling

    scaling = read_scaling(
        resolve(ROUTER_FLAGS, {"provider": "local:x", "sleep": "5m"}, environ={})
    )
    assert (scaling.config.prefill.sleep_s, scaling.config.decode.sleep_s) == (300.0, 300.0)


@pytest.mark.parametrize(
    "given", [{}, {"provider": "kubernetes:llm/prefill,decode"}, {"scaler_port": "9090"}]
)
def test_workers_of_others_do_not_sleep(given):
    from kvrelay.cli.scaling import read_scaling

    with pytest.raises(UsageError, match=r"^--sleep 300 needs --provider local:SOCKET"):
        read_scaling(resolve(ROUTER_FLAGS, given | {"sleep": "5m"}, environ={}))
