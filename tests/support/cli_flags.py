"""What the commands really take, for tests of files that name flags and variables."""

from kvrelay.cli.commands.serve import SERVE_FLAGS
from kvrelay.cli.commands.shared import ROUTER_FLAGS, WORKER_FLAGS
from kvrelay.cli.flags import Flag
from kvrelay.cli.settings import resolve

FLAGS = {
    "router": ROUTER_FLAGS,
    "prefill": WORKER_FLAGS,
    "decode": WORKER_FLAGS,
    "serve": SERVE_FLAGS,
}


def parse(arguments: list[str], environ: dict[str, str], *, files: tuple[str, ...] = ()) -> dict:
    """The settings that a container started like this ends up with.

    Args:
        arguments: role first, as in `args` of a pod.
        environ: of the container.
        files: flags whose value is a file that is mounted there and not here; not checked.

    Raises:
        AssertionError: a flag or a KVRELAY_ variable that the command does not have.
        UsageError: a value that it refuses.
    """
    role, *rest = arguments
    flags = FLAGS[role]
    by_name = {flag.name: flag for flag in flags}
    given = {}
    for argument in rest:
        name, _, value = argument.partition("=")
        if not argument.startswith("-"):
            name, value = "model", argument
        assert name in by_name, f"kvrelay {role} has no {name}"
        if name not in files:
            given[by_name[name].dest] = value
    check_variables(role, environ)
    return vars(resolve([_needed(flag, files) for flag in flags], given, environ=environ))


def check_variables(role: str, environ: dict[str, str]) -> None:
    """Every KVRELAY_ variable is one that the command reads."""
    known = {flag.variable for flag in FLAGS[role]} | {"KVRELAY_LOG_LEVEL"}
    ours = {name for name in environ if name.startswith("KVRELAY_")}
    assert ours <= known, f"kvrelay {role} does not read {sorted(ours - known)}"


def _needed(flag: Flag, files: tuple[str, ...]) -> Flag:
    return flag if flag.name not in files else Flag(flag.name, flag.help, str)
