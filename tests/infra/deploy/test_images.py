"""Dockerfiles and the health check: what can be proved without an image builder."""

import re
import shlex
import socket
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

import pytest
from certificates import Authority
from cli_flags import parse
from router_process import start_router, stop

from kvrelay.cli.container import PORT_VARIABLES, read_port

ROOT = Path(__file__).parents[3]
DOCKER = ROOT / "infra" / "docker"
HEALTHCHECK = DOCKER / "healthcheck.py"
FILES = sorted(DOCKER.glob("*.Dockerfile"))
IMAGES = {"router": "router", "worker": "worker", "one-container": "worker"}
"""Targets, and the Dockerfile of each; a file's own name is what it builds without `--target`."""


def instructions(file):
    """Instruction and argument of each logical line; comments left out."""
    lines = (line for line in file.read_text().splitlines() if not line.startswith("#"))
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def stages(file):
    """Each stage's name, what it is built from and its instructions by name, the last of a kind."""
    found = []
    for name, value in instructions(file):
        if name == "FROM":
            source, _, alias = value.partition(" AS ")
            found.append((alias or file.stem, source, {}))
        elif found:
            found[-1][2][name] = value
    return found


def image(target):
    """What the image of a target ends up with, by instruction."""
    by_name = {name: (source, own) for name, source, own in stages(dockerfile(target))}
    found = {}
    while target in by_name:
        target, own = by_name[target]
        found = own | found
    return found


def dockerfile(target):
    return DOCKER / f"{IMAGES[target]}.Dockerfile"


def check(role, port):
    ran = subprocess.run(
        [sys.executable, HEALTHCHECK, role, str(port)], capture_output=True, text=True, check=False
    )
    return ran.returncode, ran.stdout.strip()


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_hadolint_has_nothing_to_say(file):
    linter = Path(sys.executable).with_name("hadolint")
    config = DOCKER / ".hadolint.yaml"
    ran = subprocess.run(
        [linter, "--config", config, file], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout) == (0, "")


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_without_a_target_a_file_builds_what_it_is_called_after(file):
    assert stages(file)[-1][0] == file.stem


@pytest.mark.parametrize("target", IMAGES)
def test_an_image_is_stopped_by_sigterm_runs_as_nobody_and_checks_itself(target):
    found = image(target)
    user = found["USER"]
    if user == "${RUN_AS}":
        user = found["ARG"].removeprefix("RUN_AS=")
    assert int(user.split(":")[0]) >= 10000
    assert found["STOPSIGNAL"] == "SIGTERM"
    assert '"kvrelay-healthcheck"' in found["HEALTHCHECK"]


@pytest.mark.parametrize("target", ["router", "worker"])
def test_sigterm_reaches_the_process_and_one_without_a_handler_still_ends(target):
    assert image(target)["ENTRYPOINT"] == '["tini", "--", "kvrelay"]'


def test_what_sagemaker_runs_is_the_command_without_tini():
    """`docker run IMAGE serve`; its documentation excludes tini as the entry point."""
    found = image("one-container")
    assert found["ENTRYPOINT"] == '["kvrelay"]'
    assert found["CMD"] == '["serve"]'
    assert found["LABEL"] == "com.amazonaws.sagemaker.capabilities.accept-bind-to-port=true"


@pytest.mark.parametrize("target", IMAGES)
def test_an_images_command_is_one_that_kvrelay_has(target):
    arguments = re.findall(r'"([^"]+)"', image(target)["CMD"])
    environ = {"KVRELAY_JOIN": "router:8001"} if arguments[0] == "decode" else {}
    parse(arguments, environ)


def test_the_one_container_has_router_and_worker():
    (install,) = [
        value
        for name, value in instructions(dockerfile("one-container"))
        if name == "RUN" and "[all,aws]" in value
    ]
    assert "pip install" in install
    assert image("one-container")["COPY"] == "--from=build-one /opt/kvrelay /opt/kvrelay"
    assert image("worker")["COPY"] == "--from=build /opt/kvrelay /opt/kvrelay"


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_base_images_are_pinned_to_a_day(file):
    (base,) = [v for n, v in instructions(file) if n == "ARG" and v.startswith("BASE=")]
    assert re.fullmatch(r"BASE=debian:bookworm-\d{8}-slim", base)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_only_the_worker_needs_a_compiler_and_torch(file):
    text = "\n".join(v for n, v in instructions(file) if n == "RUN")
    is_worker = file.stem == "worker"
    assert ("g++" in text) == is_worker
    assert ("TORCH_SPEC" in text) == is_worker


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_bytecode_is_in_the_image_where_no_start_could_write_it(file):
    """The root is read-only, and compiling torch's modules anew takes seconds of every start."""
    installs = [v for n, v in instructions(file) if n == "RUN" and "pip install" in v]
    assert installs
    assert not any("--no-compile" in each for each in installs)


def test_the_builder_is_sent_what_the_wheel_is_made_of():
    rules = [r for r in (ROOT / ".dockerignore").read_text().splitlines() if r and r[0] != "#"]

    def sent(path):
        verdict = True
        for rule in rules:
            pattern = rule.removeprefix("!")
            if fnmatch(path, pattern) or path.startswith(f"{pattern}/"):
                verdict = rule.startswith("!")
        return verdict

    project = (ROOT / "pyproject.toml").read_text()
    packages = re.findall(r'^    "([a-z_]+/kvrelay[a-z_]*)",$', project, re.MULTILINE)
    assert len(packages) >= 11
    needed = [*packages, "pyproject.toml", "README.md", "LICENSE", "infra/docker/healthcheck.py"]
    assert [path for path in needed if not sent(path)] == []
    assert not any(sent(p) for p in (".git/config", ".venv/bin/python", "infra/compose/.env"))


def test_copied_files_exist():
    for file in FILES:
        for name, value in instructions(file):
            if name == "COPY" and "--from" not in value:
                *sources, _ = [w for w in shlex.split(value) if not w.startswith("--")]
                assert all((ROOT / source).exists() for source in sources)


def test_a_router_without_workers_is_healthy(router):
    assert check("router", router.port) == (0, "ok")


def test_a_port_where_nothing_answers_is_not(unused_port):
    code, said = check("router", unused_port)
    assert code == 1
    assert f"port {unused_port}" in said


def test_a_router_behind_tls_is_asked_over_tls(tmp_path):
    identity = Authority(tmp_path).issue("llm.example.org")
    process, ports = start_router(f"--tls-cert={identity.cert}", f"--tls-key={identity.key}")
    try:
        assert check("router", ports.port) == (0, "ok")
    finally:
        stop(process)


def test_a_worker_is_healthy_while_it_is_connected_to_a_router(router):
    code, said = check("worker", router.join_port)
    assert code == 1
    assert f"port {router.join_port}" in said
    with socket.create_connection(("127.0.0.1", router.join_port)):
        assert check("worker", router.join_port) == (0, "ok")
    deadline = time.monotonic() + 60
    while check("worker", router.join_port)[0] == 0:
        assert time.monotonic() < deadline


def test_one_container_is_healthy_once_its_model_answers(router):
    code, said = check("serve", router.port)
    assert (code, said) == (1, "it is not ready: no_decode_worker")


@pytest.mark.parametrize("name", PORT_VARIABLES)
def test_the_check_asks_where_the_command_listens(name, unused_port):
    environ = {name: str(unused_port)}
    assert read_port(None, environ) == unused_port
    ran = subprocess.run(
        [sys.executable, HEALTHCHECK, "serve"],
        env=environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert f"port {unused_port}" in ran.stdout


def test_a_role_nobody_has_is_an_error():
    ran = subprocess.run([sys.executable, HEALTHCHECK, "cook"], capture_output=True, check=False)
    assert ran.returncode == 2
