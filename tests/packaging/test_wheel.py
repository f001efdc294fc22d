"""What `pip install` brings, checked on the built wheel rather than on the source tree."""

import email
import importlib.metadata
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "kvrelay", "kvrelay_protocol", "kvrelay_router", "kvrelay_engine", "kvrelay_kernels",
    "kvrelay_transfer", "kvrelay_prefill", "kvrelay_decode", "kvrelay_infra",
    "kvrelay_bench", "kvrelay_chaos",
}  # fmt: skip
FORBIDDEN = ("torch", "numpy", "grpc", "google.protobuf", "fastapi", "uvicorn", "tokenizers",
             "transformers", "ucxx", "opentelemetry", "prometheus_client", "psutil", "xxhash")  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--wheel-dir",
            str(target),
            str(ROOT),
        ],
        check=True,
    )
    (built,) = target.glob("*.whl")
    return built


def test_the_base_package_needs_httpx_and_pydantic_only(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    required = metadata.get_all("Requires-Dist")
    base = {re.split(r"[<>=!~ \[;]", r)[0] for r in required if "extra ==" not in r}
    assert base == {"httpx", "pydantic"}
    extras = {"router", "worker", "all", "aws", "kubernetes", "bench", "dev"}
    assert set(metadata.get_all("Provides-Extra")) == extras


def test_the_wheel_holds_every_package_typed_and_the_demo_model(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {n.split("/")[0] for n in names if ".dist-info" not in n}
    assert tops == PACKAGES
    assert {f"{p}/py.typed" for p in PACKAGES} <= names
    demo = {
        f"kvrelay_protocol/demo_model/{n}"
        for n in ("config.json", "model.safetensors", "tokenizer.json")
    }
    assert demo <= names
    assert "kvrelay_protocol/fleet.proto" in names
    assert wheel.stat().st_size < 12 * 2**20


def test_the_client_works_from_the_wheel_without_any_extra(wheel, tmp_path):
    """Only what the base package needs can be imported, as in a fresh environment."""
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(tmp_path),
            str(wheel),
        ],
        check=True,
    )
    script = f"""
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if any(name == f or name.startswith(f + ".") for f in {FORBIDDEN!r}):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Block())
sys.path.insert(0, {str(tmp_path)!r})
import kvrelay
assert kvrelay.__file__.startswith({str(tmp_path)!r}), kvrelay.__file__
from kvrelay import Client, AsyncClient, Finished, TextDelta, KvrelayClientError
client = Client(base_url="http://127.0.0.1:9")
try:
    client.models()
except KvrelayClientError as error:
    print(type(error).__name__)
client.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "APIConnectionError"


@pytest.mark.parametrize(
    "module", ["kvrelay", "kvrelay.cli.main", "kvrelay_router.main", "kvrelay_infra.local"]
)
def test_sdk_router_and_supervisor_never_import_torch(module):
    script = (
        f"import sys, {module}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_installed_version_is_the_projects():
    assert importlib.metadata.version("kvrelay") in (ROOT / "pyproject.toml").read_text()
