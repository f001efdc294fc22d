"""The comparison: what is measured in which order, against which limit, and in which processes."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvrelay.cli.main import main
from kvrelay_bench.compare import peers, run
from kvrelay_bench.compare.agreement import compare_answers
from kvrelay_bench.compare.engines import Setting, memory_needed, our_spec, wanted_engines
from kvrelay_bench.compare.peers import MARKER, RECIPES, PeerUnavailable, ensure_peer
from kvrelay_bench.compare.points import Point, draw_prompts, parse_points
from kvrelay_bench.compare.processes import EngineProcess, EngineSpec, Start
from kvrelay_bench.compare.result import Measurement, compare_table, make_rows, verdicts
from kvrelay_bench.compare.schedule import contenders, fit, interleave
from kvrelay_bench.compare.work import work_of
from kvrelay_bench.machine import Limits
from kvrelay_bench.models import MODELS, bench_model
from kvrelay_bench.startup import run as startup_run
from kvrelay_protocol.errors import WorkerStartFailed

A, B = Point(1, 32, 64), Point(4, 1024, 8)
TINY = MODELS["tiny"]


# What is measured


def test_points_are_read_and_printed_as_they_are_typed():
    points = parse_points("1x32x64,4X1024x8")
    assert points == (A, B)
    assert str(points) == "1x32x64,4x1024x8"
    assert (B.generated, B.tokens) == (32, 4128)


def test_mostly_prompt_is_judged_by_all_tokens():
    assert [point.is_prefill for point in (A, Point(32, 128, 64), B)] == [False, False, True]


@pytest.mark.parametrize("text", ["8x32", "8x32x", "0x1x1", "8x-1x2", "a", "", "1x1x1,"])
def test_a_wrong_point_is_one_line(text, capsys):
    assert main(["bench", "compare", f"--points={text}"]) == 2
    assert capsys.readouterr().err == (
        f"kvrelay: --points {text or repr('')} must be BATCHxINPUTxOUTPUT, such as 8x32x64\n"
    )


NAMES = "transformers, transformers-float32, vllm-cpu, vllm-cpu-eager, llama-cpp"


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("--points=1x1x1,1x1x1", "--points 1x1x1,1x1x1 must not name a point twice"),
        ("--peers=vlm", "--peers vlm must be different names of " + NAMES + ", with commas between"),
        ("--model=7b", "model 7b is neither a folder here nor a benchmark size (tiny, 135m, 0.5b)"),
        ("--rounds=0", "--rounds 0 must be a whole number at least 1"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_one_line(flag, line, capsys):
    assert main(["bench", "compare", flag]) == 2
    assert capsys.readouterr().err == f"kvrelay: {line}\n"


def test_prompts_differ_from_round_to_round_and_repeat_with_their_seed():
    first = draw_prompts(B, 49152, seed=1)
    assert [len(prompt) for prompt in first] == [1024] * 4
    assert draw_prompts(B, 49152, seed=1) == first
    assert draw_prompts(B, 49152, seed=2) != first
    assert all(256 <= token < 49152 for prompt in first for token in prompt)
    assert all(0 <= token < 8 for token in draw_prompts(A, 8, seed=0)[0])


# In which order


def test_a_round_visits_every_engine_at_a_point_before_the_next_point():
    assert interleave([A, B], ["x", "y"]) == [(A, "x"), (A, "y"), (B, "x"), (B, "y")]


SECONDS = {(A, "ours"): 2.0, (A, "near"): 2.5, (A, "slow"): 9.0,
           (B, "ours"): 6.0, (B, "near"): 8.0, (B, "slow"): 20.0}  # fmt: skip
PAIRS = interleave([A, B], ["ours", "near", "slow"])
DECIDING = {(A, "ours"), (A, "near"), (B, "ours"), (B, "near")}


def test_ours_and_the_peers_near_the_best_decide():
    assert contenders(SECONDS, ours=["ours"]) == DECIDING
    # However slow we are.
    assert (A, "ours") in contenders({**SECONDS, (A, "ours"): 99.0}, ours=["ours"])


@pytest.mark.parametrize(
    ("remaining", "left"),
    [
        (100.0, PAIRS),
        (28.0, [pair for pair in PAIRS if pair != (B, "slow")]),
        (20.0, [pair for pair in PAIRS if pair[1] != "slow"]),
        (5.0, [(A, "ours"), (A, "near")]),
        (1.0, []),
        (-3.0, []),
    ],
)
def test_when_time_runs_out_the_slow_calls_go_first_then_the_slow_point(remaining, left):
    assert fit(PAIRS, SECONDS, DECIDING, remaining) == left


# Against which limit


def test_work_is_what_counting_token_by_token_gives():
    point = Point(3, 5, 4)
    layers = TINY.num_layers * TINY.layer_parameters
    head = TINY.hidden_size * TINY.vocab_size
    pair = 4 * TINY.num_layers * TINY.num_heads * TINY.head_dim
    prefill = decode = read = 0.0
    for _sequence in range(point.batch):
        for position in range(point.input_len):
            prefill += 2 * layers + pair * (position + 1)
        prefill += 2 * head
        for step in range(1, point.output_len):
            seen = point.input_len + step
            decode += 2 * (layers + head) + pair * seen
            read += seen * TINY.kv_values_per_token * 2
    read += 2.0 * TINY.linear_parameters * (point.output_len - 1)
    work = work_of(point, TINY, 2.0)
    assert work.prefill_flops == prefill
    assert work.decode_flops == decode
    assert work.decode_bytes == read
    assert work.prefill_bytes == 2.0 * TINY.linear_parameters
    assert (work.bytes, work.flops) == (
        work.prefill_bytes + work.decode_bytes,
        work.prefill_flops + work.decode_flops,
    )


def test_the_floor_is_bound_by_reads_or_by_operations_phase_by_phase():
    work = work_of(Point(1, 64, 8), TINY, 2.0)
    reading = Limits(1, 1.0, {"float32": 1e30, "int8": 1.0})
    multiplying = Limits(1, 1e30, {"float32": 1.0, "int8": 1.0})
    assert work.floor_s(reading) == work.bytes
    assert work.floor_s(multiplying) == work.flops


def spec(name, dtype="bfloat16"):
    return EngineSpec(name, "none", Path(sys.executable), {}, {}, dtype)


def rows_of(seconds, limits=None):
    specs = {name: spec(name, dtype) for name, dtype, _ in seconds}
    measured = [
        Measurement(A, name, number, taken, taken, 0.0)
        for name, _, calls in seconds
        for number, taken in enumerate(calls, 1)
    ]
    return make_rows(measured, specs, TINY, limits)


def test_rates_are_of_the_median_call_and_ratios_stay_within_a_class():
    rows = rows_of([
        ("kvrelay", "bfloat16", [2.0, 1.0, 3.0]),
        ("kvrelay int8", "int8", [1.0]),
        ("near", "bfloat16", [4.0]),
        ("far", "bfloat16", [9.0]),
        ("wide", "float32", [1.6]),
        ("q8", "q8_0", [1.5]),
    ])  # fmt: skip
    ours = rows[0]
    assert ours.output_per_s == 64 / 2.0
    assert ours.total_per_s == 96 / 2.0
    assert ours.seconds.spread == 1.0
    assert (ours.read_share, ours.floor_share) == (None, None)
    table = compare_table(rows, ["kvrelay", "kvrelay int8"])
    assert [row[-1] for row in table.rows] == ["2.00x", "1.50x", "1.00x", "0.44x", "1.00x", "1.00x"]
    assert verdicts(rows, "kvrelay", "kvrelay int8") == [
        "1x32x64: kvrelay 2.00x near, 0.80x wide in fp32",
        "1x32x64: kvrelay int8 2.00x kvrelay, 1.50x q8",
    ]


def test_shares_are_of_the_measured_limits():
    limits = Limits(2, 1e6, {"float32": 1e9, "bfloat16": 2e9, "int8": 3e9})
    (row,) = rows_of([("kvrelay", "bfloat16", [2.0])], limits)
    work = work_of(A, TINY, 2.0)
    assert row.read_share == pytest.approx(work.bytes / 2.0 / 1e6)
    assert row.gemm_share == pytest.approx(work.flops / 2.0 / 2e9)
    assert row.floor_share == pytest.approx(work.floor_s(limits) / 2.0)


# Do they compute the same


REFERENCE = ([[5, 6, 7], [8, 9, 1]], [{5: -1.0, 2: -1.05, 3: -4.0}, {8: -1.0, 4: -3.0}])


def test_equal_answers_agree():
    found = compare_answers(REFERENCE, REFERENCE)
    assert (found.first_tokens, found.greedy_tokens, found.max_logprob_error) == (2, 6, 0.0)
    assert found.sound


def test_tokens_count_up_to_the_first_that_differs():
    found = compare_answers(([[5, 0, 7], [8, 9, 1]], [{5: -1.2}, {8: -1.0}]), REFERENCE)
    assert (found.first_tokens, found.greedy_tokens, found.of_greedy_tokens) == (2, 4, 6)
    assert found.max_logprob_error == pytest.approx(0.2)
    assert found.sound


def test_another_first_token_is_sound_only_between_near_equals():
    near = compare_answers(([[2, 6, 7], [8, 9, 1]], [{2: -1.0}, {8: -1.0}]), REFERENCE)
    assert (near.first_tokens, near.near_ties, near.sound) == (1, 1, True)
    wrong = compare_answers(([[3, 6, 7], [8, 9, 1]], [{3: -1.0}, {8: -1.0}]), REFERENCE)
    assert (wrong.near_ties, wrong.sound) == (0, False)


# Who takes part


def test_float32_joins_where_the_cpu_has_no_bf16_and_q8_0_with_int8():
    chosen = ["transformers", "llama-cpp"]
    assert wanted_engines(chosen, int8=False, cpu_flags=["avx512_bf16"]) == ["kvrelay", *chosen]
    assert wanted_engines(chosen, int8=True, cpu_flags=["avx2"]) == [
        "kvrelay", "kvrelay int8", "transformers", "transformers-float32", "llama-cpp",
        "llama-cpp q8_0",
    ]  # fmt: skip


def test_engines_that_do_not_fit_into_memory_side_by_side_are_refused(tmp_path, monkeypatch):
    from kvrelay_infra.host import Memory
    from kvrelay_protocol.errors import NotEnoughMemory

    setting = Setting(tmp_path, MODELS["0.5b"], 1, (A, B))
    session = run.Session(SimpleNamespace(), setting, run.Findings(setting.shape))
    session.findings.specs = {"a": spec("a"), "b": spec("b", "float32")}
    needed = memory_needed(list(session.findings.specs.values()), setting)
    assert 4e9 < needed < 6e9
    monkeypatch.setattr(run, "read_memory", lambda: Memory(needed, needed))
    session._check_memory()
    monkeypatch.setattr(run, "read_memory", lambda: Memory(needed, needed - 1))
    with pytest.raises(NotEnoughMemory, match=r"^2 engines side by side take about .* --peers"):
        session._check_memory()


# Peers and their environments


def test_a_finished_environment_is_used_as_it_is(tmp_path):
    recipe = RECIPES["llama-cpp"]
    folder = tmp_path / f"llama-cpp-{recipe.version}"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    (folder / MARKER).write_text(json.dumps({"version": recipe.version}))
    said = []
    assert ensure_peer("llama-cpp", tmp_path, said.append) == folder / "bin" / "python"
    assert said == []


def test_without_a_compiler_the_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(PeerUnavailable, match=r"no C\+\+ compiler is installed; install g\+\+"):
        ensure_peer("llama-cpp", tmp_path / "peers", print)
    assert not (tmp_path / "peers").exists()


def test_without_the_venv_module_the_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(PeerUnavailable, match=r"makes no virtual environment: .*python3-venv"):
        ensure_peer("transformers", tmp_path, lambda _line: None)


def test_a_peers_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PeerUnavailable, match=r"could not be installed into .*: File exists"):
        ensure_peer("transformers", tmp_path / "file", lambda _line: None)


def test_a_half_made_environment_is_made_again_and_marked_when_done(tmp_path, monkeypatch):
    steps = []
    recipe = peers.Recipe("fake", "1", lambda environment: steps.append(environment.peer),
                          needs_torch=False)  # fmt: skip
    monkeypatch.setitem(RECIPES, "fake", recipe)
    half = tmp_path / "fake-1" / "lib"
    half.mkdir(parents=True)
    monkeypatch.setattr(peers.Environment, "_logged", lambda self, *_: self.folder.mkdir() or 0)
    ensure_peer("fake", tmp_path, lambda _line: None)
    assert steps == ["fake"]
    assert not half.exists()
    assert json.loads((tmp_path / "fake-1" / MARKER).read_text()) == {"version": "1"}


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("Retrying ... NewConnectionError(...)\nERROR: No matching distribution found for x",
         "the package index can't be reached"),
        ("Collecting\nERROR: no space left\n", "no space left"),
        ("Segmentation fault\n\n", "Segmentation fault"),
    ],
)  # fmt: skip
def test_why_pip_failed(log, reason, tmp_path):
    (tmp_path / "log").write_text(log)
    assert peers._pip_error(tmp_path / "log") == reason


@pytest.mark.parametrize(
    ("line", "name"),
    [("torch==2.13.0+cpu; x", "torch"), ("torchaudio", "torchaudio"), ("ray[cgraph]>=2", "ray"),
     ("Numba ==1", "numba")],
)  # fmt: skip
def test_the_project_of_a_requirement(line, name):
    assert peers._project(line) == name


def test_torch_is_installed_first_with_the_variables_of_setup(monkeypatch):
    calls = []
    environment = SimpleNamespace(pip=lambda *arguments: calls.append(arguments))
    monkeypatch.setenv("TORCH_INDEX_URL", "https://index")
    monkeypatch.setenv("TORCH_SPEC", "torch==2.11.0")
    peers._install_torch(environment)
    monkeypatch.delenv("TORCH_INDEX_URL")
    monkeypatch.delenv("TORCH_SPEC")
    peers._install_torch(environment)
    assert calls == [("--index-url", "https://index", "torch==2.11.0"), ("torch==2.13.0",)]


# The processes


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return bench_model("tiny", root=tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def engine(model, tmp_path_factory):
    setting = Setting(model, TINY, 1, (Point(2, 8, 4),))
    process = EngineProcess(our_spec(setting), tmp_path_factory.mktemp("logs") / "engine.log")
    try:
        process.start = process.wait_ready(250.0)
        yield process
    finally:
        process.close()


def test_an_engine_says_when_each_phase_ended_and_what_it_is_made_of(engine):
    start = engine.start
    assert 0 < start.python_s < start.import_s < start.ready_s
    assert {"kvrelay", "torch"} <= start.versions.keys()
    assert set(start.phases) == {"weights, packing", "warm-up"}
    assert sum(start.phases.values()) < start.ready_s - start.import_s


def test_an_engine_in_a_process_computes_what_the_model_says(engine, model):
    import torch
    from transformers import AutoModelForCausalLM

    prompts = draw_prompts(Point(2, 8, 4), TINY.vocab_size, seed=3)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        logprobs = reference(torch.tensor(prompts)).logits[:, -1].log_softmax(-1)
    tokens, found = engine.check(prompts, 4, 5, 60.0)
    assert [row[0] for row in tokens] == logprobs.argmax(-1).tolist()
    for row, expected in zip(found, logprobs, strict=True):
        assert len(row) >= 5
        for token, value in row.items():
            assert value == pytest.approx(expected[token].item(), abs=0.02)
    run_again = engine.generate(prompts, 4, 60.0)
    assert run_again.tokens == tokens
    assert run_again.seconds > 0


def test_a_sleeping_engine_does_nothing_and_answers_when_it_wakes(engine):
    group = engine._process.pid
    engine.sleep()
    try:
        _, status = os.waitpid(group, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        assert Path(f"/proc/{group}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        with pytest.raises(WorkerStartFailed, match="kvrelay gave no answer in 0 s"):
            engine.generate([[300, 301]], 2, 0.2)
    finally:
        engine.wake()
    # The request that was asked in its sleep is answered first.
    assert engine._reply("generated", 60.0)["tokens"]
    assert len(engine.generate([[300, 301]], 3, 60.0).tokens[0]) == 3


def test_an_engine_that_ends_is_one_line_with_its_log(tmp_path):
    setting = Setting(tmp_path / "none", TINY, 1, (A,))
    process = EngineProcess(our_spec(setting), tmp_path / "engine.log")
    try:
        with pytest.raises(WorkerStartFailed) as error:
            process.wait_ready(250.0)
    finally:
        process.close()
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("kvrelay ended: InvalidModel: model folder ")
    assert str(tmp_path / "engine.log") in str(error.value)


def write_worker(folder, body):
    """An engine that needs no model; its file lies beside a copy of the real main."""
    shutil.copy(run.__file__.replace("run.py", "workers/main.py"), folder / "main.py")
    (folder / "fake.py").write_text(
        "class Engine:\n"
        "    def __init__(self, options): pass\n"
        "    def versions(self): return {}\n"
        f"    def generate(self, prompts, output_len): {body}\n"
    )


@pytest.fixture
def fake(tmp_path, monkeypatch):
    processes = []

    def start(body):
        write_worker(tmp_path, body)
        monkeypatch.setattr("kvrelay_bench.compare.processes.WORKERS", tmp_path)
        fake_spec = EngineSpec("fake", "fake", Path(sys.executable), {})
        processes.append(EngineProcess(fake_spec, tmp_path / "fake.log"))
        processes[-1].wait_ready(60.0)
        return processes[-1]

    yield start
    for process in processes:
        process.close()


def test_what_an_engine_prints_does_not_reach_the_replies(fake, tmp_path):
    process = fake("print('noise'); return [[1] * output_len for _ in prompts]")
    assert process.generate([[5], [6]], 2, 60.0).tokens == [[1, 1], [1, 1]]
    process.close()
    assert "noise" in (tmp_path / "fake.log").read_text()


def test_answers_of_another_length_are_refused(fake):
    with pytest.raises(WorkerStartFailed, match=r"fake returned \[1\] tokens, 2 were asked"):
        fake("return [[1]]").generate([[5]], 2, 60.0)


def test_a_killed_engine_says_so(fake):
    process = fake("import os; os.kill(os.getpid(), 9)")
    with pytest.raises(WorkerStartFailed, match="fake was killed, perhaps for memory"):
        process.generate([[5]], 2, 60.0)


def test_closing_ends_a_sleeping_engine_and_its_children(fake):
    process = fake("import subprocess, sys; child = subprocess.Popen([sys.executable, '-c',"
                   "'import time; time.sleep(600)']); return [[child.pid]]")  # fmt: skip
    child = process.generate([[5]], 1, 60.0).tokens[0][0]
    process.sleep()
    process.close()
    assert process._process.returncode is not None
    deadline = time.monotonic() + 30
    while _runs(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _runs(pid):
    """Neither gone nor a zombie that init has yet to collect."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# The whole


def values_for(model, out, **other):
    chosen = {"model": str(model), "peers": (), "int8": False, "points": parse_points("1x8x2,2x8x2"),
              "rounds": 2, "max_time": 600.0, "threads": 1, "skip_check": True,
              "peers_dir": out.parent, "out": out}  # fmt: skip
    return SimpleNamespace(**{**chosen, **other})


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """No probe of a machine that other tests keep busy; logs below the test's folder."""
    # Not XDG_CACHE_HOME: the compiled kernels are kept there as well.
    monkeypatch.setattr(run, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(startup_run, "cache_dir", lambda: tmp_path / "cache")
    limits = Limits(1, 1e9, {"float32": 1e10, "int8": 1e10})
    monkeypatch.setattr(run, "probe_limits", lambda _threads: limits)
    return tmp_path / "result.json"


def test_a_comparison_writes_every_call_and_row_and_leaves_out_what_cannot_be_installed(
    model, quick, monkeypatch, capsys
):
    monkeypatch.setattr(peers, "_compiler", lambda: None)
    assert run.run_compare(values_for(model, quick, peers=("llama-cpp",))) == 1
    found = json.loads(quick.read_text())
    assert "no C++ compiler" in found["left_out"]["llama-cpp"]
    assert [(row["point"], row["engine"]) for row in found["rows"]] == [
        ("1x8x2", "kvrelay"), ("2x8x2", "kvrelay")
    ]  # fmt: skip
    assert [(call["point"], call["round"]) for call in found["calls"]] == [
        ("1x8x2", 1), ("2x8x2", 1), ("1x8x2", 2), ("2x8x2", 2)
    ]  # fmt: skip
    assert all(row["ratio_to_best_peer"] is None for row in found["rows"])
    out = capsys.readouterr().out
    assert "1x8x2: kvrelay has no peer" in out
    assert f"written: {quick}" in out


def test_an_interrupted_comparison_keeps_what_it_has_and_leaves_no_process(
    model, quick, monkeypatch
):
    real, calls, groups = run.Session._call, [], []

    def interrupted(self, *arguments):
        calls.append(arguments)
        groups[:] = [process._process.pid for process in self.engines.values()]
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(self, *arguments)

    monkeypatch.setattr(run.Session, "_call", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.run_compare(values_for(model, quick))
    assert len(json.loads(quick.read_text())["calls"]) == 1
    for group in groups:
        with pytest.raises(ProcessLookupError):
            os.killpg(group, signal.SIGCONT)


def test_points_beyond_the_model_are_one_line_before_anything_starts(model, capsys):
    assert main(["bench", "compare", f"--model={model}", "--points=1x8190x8"]) == 2
    assert capsys.readouterr().err == (
        "kvrelay: --points: 8198 tokens of prompt and answer exceed the model's 8192\n"
    )


def test_the_engine_alone_is_measured_in_this_process(model, quick, monkeypatch, capsys):
    import torch

    from kvrelay_bench.engine import run as engine_run

    limits = Limits(1, 1e9, {"float32": 1e10, "int8": 1e10})
    monkeypatch.setattr(engine_run, "probe_limits", lambda _threads: limits)
    monkeypatch.setattr(engine_run, "set_threads", lambda _threads: None)
    before = torch.get_num_threads()
    try:
        command = ["bench", "engine", f"--model={model}", "--batch=2", "--input-len=8",
                   "--output-len=3", "--rounds=2", "--threads=1", f"--out={quick}"]  # fmt: skip
        assert main(command) == 0
    finally:
        torch.set_num_threads(before)
    found = json.loads(quick.read_text())
    (row,) = found["rows"]
    assert row["seconds"]["count"] == len(found["calls"]) == 2
    assert row["output_tokens_per_s"] == pytest.approx(6 / row["seconds"]["median"])
    assert found["dtype"] == "bfloat16"
    assert "round 2/2" in capsys.readouterr().out


def test_prompts_beyond_the_model_are_one_line(model, capsys):
    assert main(["bench", "engine", f"--model={model}", "--input-len=9000"]) == 2
    assert capsys.readouterr().err == (
        "kvrelay: --input-len 9000 and --output-len 64 exceed the model's 8192 tokens\n"
    )


def test_start_up_is_told_phase_by_phase(model, quick, capsys):
    assert startup_run.run_startup(values_for(model, quick, rounds=1)) == 0
    found = json.loads(quick.read_text())
    (row,) = found["rows"]
    assert row["first_token_s"]["count"] == 1
    assert list(row["phases_s"]) == [
        "python", "import", "weights, packing", "warm-up", "other", "first token"
    ]  # fmt: skip
    assert sum(row["phases_s"].values()) == pytest.approx(row["first_token_s"]["median"])
    assert row["first_start_s"] > 0
    assert "not counted" in capsys.readouterr().out


def test_an_engine_that_tells_no_phases_has_one_called_load():
    start = Start(0.1, 1.0, 5.0, {}, {})
    assert startup_run.phases(start, 7.0) == {
        "python": 0.1, "import": 0.9, "load": 4.0, "first token": 2.0
    }  # fmt: skip
