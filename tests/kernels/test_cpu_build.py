"""Building the compiled kernels: once, by one of several processes, or not at all."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvrelay_kernels.cpu import build
from kvrelay_kernels.cpu.library import cpu_library

NO_COMPILER = """
import torch
from kvrelay_kernels.paged_attention import attention_layout, paged_attention
from kvrelay_kernels.rms_norm import rms_norm
from kvrelay_kernels.silu_mul import silu_mul

x, weight = torch.randn(3, 8), torch.rand(8)
for _ in range(2):
    normed = rms_norm(x, weight, 1e-5)
torch.testing.assert_close(normed, torch.nn.functional.rms_norm(x, (8,), weight, 1e-5))
gate, up = x.chunk(2, dim=1)
torch.testing.assert_close(silu_mul(x), torch.nn.functional.silu(gate) * up)
key, value = torch.randn(2, 1, 16, 1, 16)
query = torch.randn(5, 2, 16)
table = torch.zeros(1, 1, dtype=torch.int32)
out = paged_attention(query, key, value, attention_layout(table, [5], [5]), scale=0.25)
expected = torch.nn.functional.scaled_dot_product_attention(
    query.transpose(0, 1), key[0, :5].transpose(0, 1), value[0, :5].transpose(0, 1),
    is_causal=True, scale=0.25,
)
torch.testing.assert_close(out, expected.transpose(0, 1))
print("right")
"""

BUILD = """
import sys
from pathlib import Path
from kvrelay_kernels.cpu import build

build._SOURCES = Path(sys.argv[1])
print(build.build_library())
"""

compiler = pytest.mark.skipif(
    not shutil.which("g++") and not shutil.which("clang++"), reason="no C++ compiler"
)


def environment(tmp_path, cxx):
    return {**os.environ, "CXX": str(cxx), "XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}


def small_library(folder):
    """Sources that build in a moment."""
    folder.mkdir()
    (folder / "one.hpp").write_text("#define ONE 1\n")
    (folder / "one.cpp").write_text('#include "one.hpp"\nextern "C" int one() { return ONE; }\n')
    return folder


def counting_compiler(tmp_path):
    """A compiler that leaves a line for each source that it compiles."""
    real = shutil.which("g++") or shutil.which("clang++")
    script = tmp_path / "counting-cxx"
    script.write_text(
        f'#!/bin/sh\ncase " $* " in *" -c "*) echo run >> "{tmp_path}/runs";; esac\nexec {real} "$@"\n'
    )
    script.chmod(0o755)
    return script


def test_without_a_compiler_torch_computes_after_one_warning(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", NO_COMPILER],
        env=environment(tmp_path, "/nonexistent/c++"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "right\n"
    (warning,) = done.stderr.splitlines()
    assert warning.startswith("no C++ compiler found (/nonexistent/c++); computing with torch")


def test_torch_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("KVRELAY_CPU_KERNELS", "torch")
    assert cpu_library.__wrapped__() is None


@compiler
def test_processes_that_start_together_build_once(tmp_path):
    sources = small_library(tmp_path / "sources")
    command = [sys.executable, "-c", BUILD, str(sources)]
    env = environment(tmp_path, counting_compiler(tmp_path))
    running = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE) for _ in range(3)]
    paths = {process.communicate()[0] for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    (path,) = paths
    assert Path(path.decode().strip()).is_file()
    assert (tmp_path / "runs").read_text() == "run\n"


@compiler
def test_a_build_is_kept_until_a_source_changes(tmp_path, monkeypatch):
    sources = small_library(tmp_path / "sources")
    monkeypatch.setattr(build, "_SOURCES", sources)
    monkeypatch.setenv("CXX", str(counting_compiler(tmp_path)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = build.build_library()
    assert build.build_library() == first
    assert (tmp_path / "runs").read_text() == "run\n"
    (sources / "one.hpp").write_text("#define ONE 2\n")
    assert build.build_library() != first
    assert (tmp_path / "runs").read_text() == "run\nrun\n"


@compiler
def test_a_failed_build_says_what_the_compiler_said_and_leaves_nothing(tmp_path, monkeypatch):
    sources = small_library(tmp_path / "sources")
    (sources / "one.cpp").write_text("int one() { return TWO; }\n")
    monkeypatch.setattr(build, "_SOURCES", sources)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(build.NoCompiler, match=r"building the CPU kernels failed: .*TWO"):
        build.build_library()
    assert not list(tmp_path.rglob("libkvrelay*"))


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "kvrelay").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", sys.executable)
    with pytest.raises(build.NoCompiler, match="building the CPU kernels failed"):
        build.build_library()


@compiler
def test_a_cache_that_others_can_write_is_not_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sources = tmp_path / "sources"
    small_library(sources)
    monkeypatch.setattr(build, "_SOURCES", sources)
    library = build.build_library()
    library.parent.chmod(0o777)
    with pytest.raises(build.NoCompiler, match="written by others; remove it"):
        build.build_library()
    library.parent.chmod(0o700)
    assert build.build_library() == library
