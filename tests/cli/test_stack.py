"""From checked values to the command line and environment of every process."""

import json
import shlex
import sys

import pytest

from kvrelay.cli import stack
from kvrelay.cli.settings import resolve
from kvrelay_infra.host import Memory


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch):
    monkeypatch.setattr(stack, "count_gpus", lambda: 0)
    monkeypatch.setattr(stack, "read_cores", lambda: 8)
    monkeypatch.setattr(stack, "own_thread_setting", lambda: None)
    monkeypatch.setattr(stack, "read_memory", lambda: Memory(64 << 30, 64 << 30))


def plan(model_dir, **overrides):
    values = stack.defaults(model=str(model_dir), port=0, join_port=0, **overrides)
    return stack.plan_stack(values)


def test_workers_get_names_ports_and_their_share_of_the_cores(model_dir):
    fleet = plan(model_dir, prefill=1, decode=2).fleet
    assert [worker.name for worker in fleet.workers] == ["prefill-0", "decode-0", "decode-1"]
    threads = [worker.environment["OMP_NUM_THREADS"] for worker in fleet.workers]
    assert threads == ["3", "2", "2"]
    join = f"--join=127.0.0.1:{fleet.join_port}"
    for worker in fleet.workers:
        role = worker.name.partition("-")[0]
        expected = [sys.executable, "-m", "kvrelay.cli", role, str(model_dir.resolve())]
        assert list(worker.command[:5]) == expected
        assert join in worker.command
        assert f"--name={worker.name}" in worker.command
    assert f"--join-port={fleet.join_port}" in fleet.router.command


def test_every_process_parses_what_it_is_given(model_dir):
    from kvrelay.cli.command import build_parser
    from kvrelay.cli.main import load_command

    fleet = plan(model_dir, api_key=("a", "b")).fleet
    for child in (fleet.router, *fleet.workers):
        command = load_command(child.command[3])
        parsed = build_parser(command).parse_args(list(child.command[4:]))
        values = resolve(command.flags, vars(parsed), environ=child.environment)
        assert values.served_model_name == "tiny-llama"
        assert values.join_token
        if child.name == "router":
            assert values.api_key == ("a", "b")
        else:
            assert values.max_model_len == 2048


def test_secrets_are_not_on_any_command_line(model_dir):
    fleet = plan(model_dir, api_key=("hunter2",), join_token="hunter3").fleet
    for child in (fleet.router, *fleet.workers):
        assert "hunter" not in " ".join(child.command)
        assert child.environment["KVRELAY_JOIN_TOKEN"] == "hunter3"
    assert fleet.router.environment["KVRELAY_API_KEY"] == "hunter2"


def test_without_a_token_every_stack_draws_its_own(model_dir):
    tokens = {plan(model_dir).fleet.router.environment["KVRELAY_JOIN_TOKEN"] for _ in range(2)}
    assert len(tokens) == 2
    assert all(len(token) > 20 for token in tokens)


def test_a_wildcard_address_is_reached_over_loopback(model_dir):
    assert plan(model_dir, host="0.0.0.0").fleet.base_url.startswith("http://127.0.0.1:")
    assert plan(model_dir, host="::1").fleet.base_url.startswith("http://[::1]:")


@pytest.mark.parametrize(
    ("cores", "roles", "fixed", "threads"),
    [
        (1, "pd", 0, [1, 1]),
        (2, "pd", 0, [1, 1]),
        (3, "pd", 0, [2, 1]),
        (4, "ppddd", 0, [1, 1, 1, 1, 1]),
        (8, "pd", 0, [4, 3]),
        (17, "pdd", 0, [6, 5, 5]),
        (2, "pd", 6, [6, 6]),
        (4, "d", 0, [4]),
    ],
)
def test_cores_are_shared_without_more_threads_than_cores(cores, roles, fixed, threads):
    names = [{"p": "prefill", "d": "decode"}[role] for role in roles]
    assert stack.share_cores(cores, names, fixed) == threads


@pytest.mark.parametrize(
    ("device", "gpus", "devices"),
    [
        ("cuda", 2, ["cuda:0", "cuda:1", "cuda:0"]),
        ("auto", 2, ["auto:0", "auto:1", "auto:0"]),
        ("cuda", 1, ["cuda"] * 3),
        ("cuda:1", 2, ["cuda:1"] * 3),
        ("cpu", 2, ["cpu"] * 3),
    ],
)
def test_workers_spread_over_the_gpus(device, gpus, devices):
    assert [stack.spread_device(device, position, gpus) for position in range(3)] == devices


def test_the_last_block_has_all_one_needs(model_dir):
    values = stack.defaults(model=str(model_dir), port=0, join_port=0, api_key=("hunter2",))
    made = stack.plan_stack(values)
    text = stack.ready_block(made, values)
    for part in (made.fleet.base_url, "tiny-llama", "2048 tokens", "curl ", "kvrelay chat "):
        assert part in text
    assert "hunter2" not in text


@pytest.mark.parametrize("more", [{}, {"api_key": ("hunter2",)}, {"kv_memory": 64 * 1024}])
def test_what_up_prints_fits_80_columns_and_its_curl_is_valid(model_dir, more):
    values = stack.defaults(model=str(model_dir), port=0, join_port=0, **more)
    made = stack.plan_stack(values)
    block = stack.ready_block(made, values)
    assert max(map(len, f"{stack.describe(made)}\n{block}".splitlines())) <= 80
    words = shlex.split(block[block.index("curl ") :])
    assert words[1] == f"{made.fleet.base_url}/v1/chat/completions"
    body = json.loads(words[words.index("-d") + 1])
    assert body["model"] == "tiny-llama"
    assert body["messages"][0]["role"] == "user"


def test_the_router_of_a_stack_leaves_the_talking_to_up(model_dir):
    assert "--supervised" in plan(model_dir).fleet.router.command
