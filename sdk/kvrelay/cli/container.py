"""`kvrelay serve`: what a platform that runs one container says, as the values of `kvrelay up`.

Such a platform connects no two containers, so there is one aggregated pool: a router, and one decode
worker that prefills too. Everything else is `up`'s.

SageMaker: https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-inference-code.html
RunPod: https://docs.runpod.io/serverless/load-balancing/overview
Cloud Run: https://cloud.google.com/run/docs/container-contract
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from kvrelay.cli.flags import Flag, integer
from kvrelay_protocol.errors import UsageError
from kvrelay_protocol.model_files import is_hub_id

MODEL_FOLDER = Path("/opt/ml/model")
"""Where SageMaker unpacks a model's artefacts."""
DEFAULT_PORT = 8080
PORT_VARIABLES = ("PORT", "SAGEMAKER_BIND_TO_PORT", "PORT_HEALTH")
"""A platform sends requests, or asks `/ping`, at these ports."""
_DOCKER_GRACE_S = 10.0
"""What is safe to assume of a platform that documents nothing."""
_CLOSING_S = 3.0
"""Of the platform's grace, after the drain: last errors and bytes leave, the worker ends."""
_REQUEST_S = 600.0
_LAST_WORD_S = 5.0
"""Before a platform cuts a request: then it ends in our error."""
_read_port = integer(1, 65535)


@dataclass(frozen=True, slots=True)
class Platform:
    """What a platform does that shows inside the container."""

    name: str
    title: str
    grace_s: float | None = None
    """From SIGTERM to SIGKILL; None: not documented, or up to the user."""
    ping_while_starting: int = 503
    request_limit_s: float | None = None
    """It cuts requests that take longer."""
    keeps_headers: bool = True
    """It hands on `Authorization` and `x-api-key`."""
    ends_tls: bool = True


PLATFORMS = {
    platform.name: platform
    for platform in (
        Platform(
            "sagemaker", "SageMaker", grace_s=30.0, request_limit_s=480.0, keeps_headers=False
        ),
        Platform("runpod", "RunPod", ping_while_starting=204, request_limit_s=330.0),
        Platform("cloud-run", "Cloud Run", grace_s=10.0),
        Platform("other", "a container", ends_tls=False),
    )
}


def recognise(environ: Mapping[str, str], folder: Path = MODEL_FOLDER) -> Platform:
    """The platform whose marks are here, else `other`."""
    if "K_SERVICE" in environ:
        return PLATFORMS["cloud-run"]
    if "RUNPOD_POD_ID" in environ or "PORT_HEALTH" in environ:
        return PLATFORMS["runpod"]
    if "SAGEMAKER_BIND_TO_PORT" in environ or folder.is_dir():
        return PLATFORMS["sagemaker"]
    return PLATFORMS["other"]


def stack_values(
    values: SimpleNamespace,
    environ: Mapping[str, str],
    foreign: Sequence[Flag],
    folder: Path = MODEL_FOLDER,
) -> tuple[Platform, SimpleNamespace]:
    """The platform, and what `up` is to be told there beside its defaults.

    Args:
        values: of `serve`'s flags.
        environ: of the container.
        foreign: flags of `up` that `serve` does not have.
        folder: where the platform puts a model.

    Raises:
        UsageError: one line for each thing that is missing or contradicts another.
    """
    found = recognise(environ, folder)
    platform = PLATFORMS[values.platform] if values.platform else found
    problems = [
        *_foreign_settings(environ, foreign),
        *_model_problems(values, folder),
        *_refused(values, environ, platform),
    ]
    port = DEFAULT_PORT
    try:
        port = read_port(values.port, environ)
    except UsageError as error:
        problems += error.message.splitlines()
    if problems:
        raise UsageError("\n".join(problems))
    grace = values.drain_grace
    if grace is None:
        grace = (platform.grace_s or _DOCKER_GRACE_S) - _CLOSING_S
    return platform, SimpleNamespace(
        **vars(values)
        | {
            "model": values.model or str(folder),
            "port": port,
            "join_port": 0,
            "prefill": 0,
            "decode": 1,
            # No other worker, so no KV travels: no UCX that a sandbox could keep from starting, no
            # port of it, hardly a buffer.
            "transport": "inproc",
            "staging_buffers": 2,
            "drain_grace": grace,
            "request_timeout": values.request_timeout or _request_timeout(platform),
            "ping_while_starting": platform.ping_while_starting,
        }
    )


def read_port(given: int | None, environ: Mapping[str, str]) -> int:
    """The one port that everybody who names one means.

    Raises:
        UsageError: two of them differ, or one is none.
    """
    named = {} if given is None else {"--port": given}
    problems = []
    for name in PORT_VARIABLES:
        if name in environ:
            try:
                named[name] = _read_port(environ[name])
            except ValueError as error:
                problems.append(f"{name}={environ[name]} {error}")
    if len(set(named.values())) > 1:
        said = ", ".join(f"{name} {port}" for name, port in named.items())
        problems.append(f"{said}: requests and /ping are answered on one port; set them alike")
    if problems:
        raise UsageError("\n".join(problems))
    return next(iter(named.values()), DEFAULT_PORT)


def first_line(platform: Platform) -> str:
    """What is said before anything else."""
    where = "in" if platform.name == "other" else "on"
    return (
        f"kvrelay serve {where} {platform.title}: one aggregated pool, no disaggregation; "
        "one worker reads prompts and writes answers, so long prompts slow running streams down"
    )


def _request_timeout(platform: Platform) -> float:
    limit = platform.request_limit_s
    return _REQUEST_S if limit is None else min(_REQUEST_S, limit - _LAST_WORD_S)


def _foreign_settings(environ: Mapping[str, str], foreign: Sequence[Flag]) -> Iterator[str]:
    for flag in foreign:
        if flag.variable in environ:
            shown = "***" if flag.secret else environ[flag.variable]
            yield (
                f"{flag.variable}={shown}: kvrelay serve has no {flag.name}, for it runs one decode "
                "worker alone; remove it, or run kvrelay up"
            )


def _model_problems(values: SimpleNamespace, folder: Path) -> Iterator[str]:
    held = (folder / "config.json").is_file()
    if values.model is None:
        if not held:
            lacks = "has no config.json" if folder.is_dir() else "is not there"
            yield (
                f"no model: set KVRELAY_MODEL to s3://bucket/prefix, a hub id, a folder or "
                f"kvrelay-demo, or put one into {folder}, which {lacks}"
            )
    elif held and Path(values.model).expanduser().resolve() != folder.resolve():
        yield f"two models: {values.model} and the one in {folder}; remove one of them"
    elif values.revision is None and is_hub_id(values.model):
        yield (
            f"{values.model} has no revision, so containers that start later may serve another "
            "model; set KVRELAY_REVISION to a commit of it"
        )


def _refused(
    values: SimpleNamespace, environ: Mapping[str, str], platform: Platform
) -> Iterator[str]:
    if environ.get("SAGEMAKER_MULTI_MODEL", "").lower() == "true":
        yield "SAGEMAKER_MULTI_MODEL=true: one container serves one model; use an endpoint for each"
    if values.api_key and not platform.keeps_headers:
        yield (
            f"--api-key: {platform.title} hands on no header that could carry a key, so every request "
            "would be refused; remove it, access is by IAM"
        )
    if platform.ends_tls and (values.tls_cert or values.tls_key):
        yield (
            f"--tls-cert, --tls-key: {platform.title} speaks plain HTTP to the container and ends TLS "
            "itself; remove them"
        )
    limit = platform.grace_s
    if limit is not None and values.drain_grace is not None and values.drain_grace >= limit:
        yield (
            f"--drain-grace {values.drain_grace:g}: {platform.title} kills the container "
            f"{limit:g} s after SIGTERM; {limit - _CLOSING_S:g} leaves time to end"
        )
