"""Everything that can be wrong before a process starts: one line, its own exit code, nothing run."""

import json
import socket
from pathlib import Path

import pytest

from kvrelay.cli import settings, stack
from kvrelay.cli.main import main
from kvrelay_infra.host import Memory, free_port
from kvrelay_protocol.weights.header import read_header

from .conftest import CONFIG, KV_BYTES_PER_TOKEN, write_safetensors

GIB = 1024**3


@pytest.fixture(autouse=True)
def no_process_starts(monkeypatch):
    """Reaching the supervisor means that every check let the command pass."""

    class Started(Exception):
        pass

    def refuse(*_args, **_kwargs):
        raise Started

    monkeypatch.setattr(stack, "Supervisor", refuse)
    monkeypatch.setattr(stack, "count_gpus", lambda: 0)
    monkeypatch.setattr(stack, "read_memory", lambda: Memory(16 * GIB, 16 * GIB))
    return Started


def up(*arguments: object) -> int:
    ports = [] if "--port" in arguments else ["--port", "0"]
    join = [] if "--join-port" in arguments else ["--join-port", "0"]
    return main(["up", *map(str, arguments), *ports, *join])


def change(folder: Path, **changes: object) -> None:
    config = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def test_a_good_model_passes(model_dir, no_process_starts, capsys):
    with pytest.raises(no_process_starts):
        up(model_dir)
    out = capsys.readouterr().out
    assert "tiny-llama: LlamaForCausalLM, 2.08 k parameters" in out
    assert "checks" in out


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def index_with_hole(folder):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


BROKEN = {
    "no config": (lambda f: (f / "config.json").unlink(), 3, "has no config.json"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), 3, "is not valid JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), 3, "holds a list"),
    "config nonsense": (lambda f: change(f, rope_scaling="x"), 3, "rope parameters are 'x'"),
    "field missing": (lambda f: change(f, hidden_size=None), 3, "lacks 'hidden_size'"),
    "architecture": (
        lambda f: change(f, architectures=["MambaForCausalLM"]),
        4,
        "architecture MambaForCausalLM is not supported; supported: LlamaForCausalLM",
    ),
    "quantised": (
        lambda f: change(f, quantization_config={"quant_method": "awq"}),
        4,
        "the checkpoint is quantised (awq)",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), 3, "has no tokenizer.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), 3, "no *.safetensors weights"),
    "weights cut short": (truncate, 3, "is damaged"),
    "weights are text": (
        lambda f: (f / "model.safetensors").write_text("version https"),
        3,
        "is not a safetensors file",
    ),
    "a shard is missing": (index_with_hole, 3, "lacks model-2.safetensors, named in model.safet"),
}


@pytest.mark.parametrize("case", BROKEN, ids=list(BROKEN))
def test_a_folder_that_is_no_usable_model(case, model_dir, capsys):
    damage, code, message = BROKEN[case]
    damage(model_dir)
    assert up(model_dir) == code
    assert_one_line(capsys, message)


def assert_one_line(capsys, message: str) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("kvrelay: ")
    assert message in line
    return line


def test_a_missing_folder(tmp_path, capsys):
    assert up(tmp_path / "nowhere") == 3
    assert_one_line(capsys, "does not exist")


@pytest.mark.parametrize("flag", ["--port", "--join-port"])
def test_a_port_in_use(flag, model_dir, capsys):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert up(model_dir, flag, port) == 5
    assert_one_line(capsys, f"port {port} on 127.0.0.1 is in use; choose another with {flag}")


def test_equal_ports(model_dir, capsys):
    port = free_port("127.0.0.1")
    assert up(model_dir, "--port", port, "--join-port", port) == 2
    assert_one_line(capsys, "--port and --join-port must differ")


def test_an_address_that_is_not_ours(model_dir, capsys):
    assert up(model_dir, "--host", "no.such.host.invalid") == 2
    assert_one_line(capsys, "can't listen on no.such.host.invalid:0 (--port)")


def test_cuda_without_a_gpu(model_dir, capsys):
    assert up(model_dir, "--device", "cuda") == 7
    assert_one_line(capsys, "--device cuda: no NVIDIA GPU here")


def test_a_gpu_that_is_not_there(model_dir, capsys, monkeypatch):
    monkeypatch.setattr(stack, "count_gpus", lambda: 2)
    assert up(model_dir, "--device", "cuda:2") == 7
    assert_one_line(capsys, "this machine has 2 GPU(s)")


def test_a_certificate_without_its_key(model_dir, capsys):
    assert up(model_dir, "--tls-cert", model_dir / "config.json") == 2
    assert_one_line(capsys, "--tls-key is missing")


def test_an_environment_without_a_usable_transport(model_dir, capsys, monkeypatch):
    monkeypatch.setenv("UCX_TLS", "sm")
    assert up(model_dir) == 9
    assert_one_line(capsys, "UCX_TLS='sm'")


def test_a_required_transport_that_ucx_does_not_choose(model_dir, capsys):
    assert up(model_dir, "--require-transport", "cuda_ipc,rc") == 9
    line = assert_one_line(capsys, "--require-transport cuda_ipc,rc: UCX chose tcp/")
    assert "UCX_TLS" in line
    assert "UCX_NET_DEVICES" in line


def test_a_worker_of_its_own_checks_the_required_transport_before_it_loads(
    model_dir, capsys, monkeypatch
):
    for name in settings.thread_environment(1):
        monkeypatch.setenv(name, "1")  # and restore what the command sets
    arguments = ["--join", "127.0.0.1:1", "--require-transport", "rc"]
    assert main(["decode", str(model_dir), *arguments]) == 9
    assert_one_line(capsys, "--require-transport rc: UCX chose tcp/")


def test_a_required_transport_that_ucx_chooses(model_dir, no_process_starts):
    with pytest.raises(no_process_starts):
        up(model_dir, "--require-transport", "rc,tcp")


@pytest.mark.parametrize("wrong", ["tcp,", "rc/mlx5", "a&b=c"])
def test_a_required_transport_is_a_name(model_dir, capsys, wrong):
    assert up(model_dir, "--require-transport", wrong) == 2
    assert_one_line(capsys, f"--require-transport {wrong} must be names such as cuda_ipc or rc,dc")


def test_too_little_memory_names_what_fits(model_dir, capsys, monkeypatch, no_process_starts):
    monkeypatch.setattr(stack, "read_memory", lambda: Memory(2 * GIB, 2 * GIB))
    assert up(model_dir, "--kv-memory", "1GiB") == 6
    assert_one_line(capsys, "2 workers need")
    assert up(model_dir, "--kv-memory", "1GiB") == 6
    hint = capsys.readouterr().err.rpartition("--kv-memory ")[2].split()[0]
    with pytest.raises(no_process_starts):
        up(model_dir, "--kv-memory", hint)


def test_far_too_little_memory(model_dir, capsys, monkeypatch):
    monkeypatch.setattr(stack, "read_memory", lambda: Memory(2 * GIB, GIB // 4))
    assert up(model_dir) == 6
    assert_one_line(capsys, "fewer workers or a smaller model would fit")


def test_a_pool_too_small_for_the_length_asked_for(model_dir, capsys):
    size = 100 * KV_BYTES_PER_TOKEN
    assert up(model_dir, "--kv-memory", size, "--max-model-len", 128) == 6
    assert_one_line(capsys, "holds 96 tokens; a sequence of 128 needs 16 KiB; raise it or lower")


def test_a_pool_that_holds_no_two_blocks(model_dir, capsys):
    assert up(model_dir, "--kv-memory", "1KiB") == 6
    assert_one_line(capsys, "--kv-memory 1 KiB holds 0 tokens; a sequence of 32 needs")


def test_more_context_than_the_model_has(model_dir, capsys):
    assert up(model_dir, "--max-model-len", 4096) == 2
    assert_one_line(capsys, "exceeds the model's own limit of 2048")


def test_without_a_length_the_pool_limits_it_and_the_last_block_says_so(model_dir):
    values = stack.defaults(
        model=str(model_dir), port=0, join_port=0, kv_memory=1000 * KV_BYTES_PER_TOKEN
    )
    plan = stack.plan_stack(values)
    assert plan.memory.max_model_len == 992
    assert "the model can do 2048: raise --kv-memory" in stack.ready_block(plan, values)


def test_bad_flags_stop_before_anything_is_read(capsys):
    assert main(["up", "/nowhere", "--decode", "0", "--dtype", "int3"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "kvrelay: --decode 0 must be a whole number from 1 to 64",
        "kvrelay: --dtype int3 must be auto or float32 or bfloat16 or float16",
    ]


def test_parameters_are_counted_from_headers(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", {"x": [3, 5], "scalar": []})
    assert sum(t.elements for t in read_header(tmp_path / "a.safetensors").values()) == 16
