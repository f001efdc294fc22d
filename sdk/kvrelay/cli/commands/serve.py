"""`kvrelay serve`: `up` as platforms that run one container want it. SageMaker runs `IMAGE serve`."""

import signal
from dataclasses import replace
from types import FrameType, SimpleNamespace
from typing import Any, NoReturn

from kvrelay.cli.command import Command
from kvrelay.cli.commands.shared import ENGINE, HTTP, MODEL, REQUESTS, STACK_FLAGS, TIMES, WEIGHTS
from kvrelay.cli.flags import Flag, choice

_PLATFORM = Flag(
    "--platform",
    "sagemaker, runpod, cloud-run or other; none: by its marks",
    choice("sagemaker", "runpod", "cloud-run", "other"),
    None,
    "platform",
    "NAME",
)
_ANY_ADDRESS = "0.0.0.0"  # noqa: S104 - the platform's proxy is outside of the container
_CHANGES: dict[str, dict[str, Any]] = {
    "model": {"help": "model folder, hub id or s3://bucket/prefix; none: the one in /opt/ml/model"},
    "--host": {"default": _ANY_ADDRESS},
    "--port": {"default": None, "help": "port to serve HTTP on; none: the platform's, or 8080"},
    "--drain-grace": {"default": None, "help": "how long open requests may take at shutdown; none: "
                      "3 s less than the platform waits"},
    "--request-timeout": {"default": None, "help": "deadline of a request that names none; none: "
                          "before the platform's, or 600"},
}  # fmt: skip
SERVE_FLAGS = (
    _PLATFORM,
    *(
        replace(flag, **_CHANGES.get(flag.name, {}))
        for flag in (*MODEL, *WEIGHTS, *HTTP, *ENGINE, *REQUESTS, *TIMES)
    ),
)
FOREIGN = tuple(
    flag for flag in STACK_FLAGS if flag.name not in {known.name for known in SERVE_FLAGS}
)
"""Flags of `up` that one decode worker alone does not need."""


def _run(values: SimpleNamespace) -> int:
    # Process 1 ignores a signal that it has no handler for.
    signal.signal(signal.SIGTERM, _leave)

    from kvrelay.cli.container import first_line, stack_values
    from kvrelay.cli.settings import own_environment

    platform, told = stack_values(values, own_environment(), FOREIGN)
    print(first_line(platform), flush=True)

    from kvrelay.cli.stack import defaults, run_up

    return run_up(defaults(**vars(told)), "serve")


def _leave(_number: int, _frame: FrameType | None) -> NoReturn:
    """Until the supervisor listens itself: nothing has started that would have to drain."""
    raise SystemExit(0)


SERVE = Command(
    "serve",
    "Serve a model in the one container of a platform: a router and one decode worker, "
    "one aggregated pool without disaggregation.",
    SERVE_FLAGS,
    _run,
    epilog="PORT, SAGEMAKER_BIND_TO_PORT and PORT_HEALTH are read, /opt/ml/model is the\n"
    "model where none is named. The platform also decides the defaults of\n"
    "--drain-grace and --request-timeout. Exit codes: those of kvrelay up.",
)
