"""Exit codes and signals of a worker process, and what start-up refuses."""

import asyncio
import os
import signal
import subprocess
import sys

import pytest
from tiny_models import tiny_model

from kvrelay_engine.runtime.config import WorkerConfig
from kvrelay_engine.runtime.process import INTERRUPTED, run_process
from kvrelay_engine.runtime.startup import LoadProgress, Phases, start_engine
from kvrelay_protocol.errors import (
    DeviceUnavailable,
    EngineFailed,
    InvalidModel,
    KvrelayError,
    NotEnoughMemory,
)


async def _nothing(_started, _shutdown):
    pass


def _raise(error):
    raise error


def test_what_started_is_served_and_a_clean_end_is_zero():
    served = []

    async def serve(engine, shutdown):
        served.append((engine, shutdown.is_set()))

    assert run_process(lambda: "engine", serve) == 0
    assert served == [("engine", False)]


@pytest.mark.parametrize(
    "error", [NotEnoughMemory("too big"), EngineFailed("the engine loop failed: x")]
)
@pytest.mark.parametrize("when", ["start", "serve"])
def test_a_typed_error_is_one_line_and_its_exit_code(capsys, error, when):
    async def serve(_engine, _shutdown):
        _raise(error)

    code = (
        run_process(lambda: _raise(error), _nothing)
        if when == "start"
        else run_process(lambda: None, serve)
    )
    assert code == error.exit_code
    assert capsys.readouterr().err == f"kvrelay: {error.message}\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_serving_sets_shutdown(number):
    async def serve(_engine, shutdown):
        os.kill(os.getpid(), number)
        await asyncio.wait_for(shutdown.wait(), 60)

    assert run_process(lambda: None, serve) == 0


_LOADING = """
import sys, time
from kvrelay_engine.runtime.process import run_process

def start():
    print("loading", flush=True)
    time.sleep(600)

async def serve(engine, shutdown):
    pass

sys.exit(run_process(start, serve))
"""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, INTERRUPTED)]
)
def test_a_signal_while_loading_ends_the_process_at_once(number, code):
    process = subprocess.Popen(
        [sys.executable, "-c", _LOADING], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with process:
        assert process.stdout.readline() == b"loading\n"
        process.send_signal(number)
        assert process.wait(60) == code
        assert process.stderr.read() == b""


def _config(**settings):
    defaults = {"name": "w", "model_dir": tiny_model("llama3"), "model_name": "m", "router": ""}
    return WorkerConfig(**(defaults | {"dtype": "float32", "num_blocks": 16} | settings))


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"device": "cuda:7"}, DeviceUnavailable, "--device cuda:7"),
        ({"num_blocks": 1}, NotEnoughMemory, "a KV pool of 1 blocks holds 16 tokens"),
        (
            {"num_blocks": 4, "max_model_len": 100},
            NotEnoughMemory,
            "one sequence needs 100; raise --kv-memory",
        ),
    ],
)
def test_settings_that_can_not_work_are_refused_with_the_fix(settings, error, text, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(error, match=text) as refused:
        start_engine(_config(**settings), Phases())
    assert refused.value.exit_code != KvrelayError.exit_code


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(InvalidModel):
        start_engine(_config(model_dir=tmp_path), Phases())


def test_every_phase_of_a_start_is_one_line_and_the_limits_are_the_smallest(capsys):
    engine = start_engine(_config(num_blocks=4), Phases.of_process())
    lines = capsys.readouterr().out.splitlines()
    names = [line.split("  ")[0] for line in lines]
    assert names == ["python, torch", "check device", "load weights", "weights", "warm up"]
    assert engine.max_model_len == 64
    assert engine.allocator.counts.free == 4
    assert engine.kv_layout.model_fingerprint == engine.fingerprint


def test_load_progress_is_quiet_until_it_takes_long(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("kvrelay_engine.runtime.startup.time.monotonic", lambda: now[0])
    progress = LoadProgress(Phases())
    progress(1, 10)
    now[0] += 10.0
    progress(10**9, 3 * 10**9)
    assert capsys.readouterr().out == "weights 1.00 of 3.00 GB, 0.10 GB/s, 20 s left\n"
