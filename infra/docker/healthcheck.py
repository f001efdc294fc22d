#!/usr/bin/env -S python3 -IES
"""Whether the process in this container does its work: exit code 0 or 1, and one line that says why.

    kvrelay-healthcheck router [PORT]   its HTTP port answers, and it does not drain (default 8000)
    kvrelay-healthcheck worker [PORT]   it holds a connection to a router's join port (default 8001)
    kvrelay-healthcheck serve [PORT]    the model answers (default: the port that `kvrelay serve` takes)

A router without workers is healthy: at zero it is the one who waits for requests. A worker opens no port
that could be asked; it joins once its engine is ready, so a connection to a router is the sign.
Nothing but the standard library, so that a check takes milliseconds.
"""

import http.client
import json
import os
import ssl
import sys
from collections.abc import Mapping
from pathlib import Path

TIMEOUT_S = 3.0
_ESTABLISHED = "01"
_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))


def check_router(port: int) -> str | None:
    """Ask whether it serves, with or without workers.

    Returns:
        What is wrong, or None.
    """
    phase, problem = _ask(port)
    return "it drains" if phase == "draining" else problem


def check_serve(port: int) -> str | None:
    """Ask whether it can answer.

    Returns:
        What is wrong, or None.
    """
    phase, problem = _ask(port)
    return problem if phase in {None, "ready"} else f"it is not ready: {phase}"


def serve_port(environ: Mapping[str, str] = os.environ) -> int:
    """Where `kvrelay serve` listens; with `--port` it has to be named here too."""
    names = ("KVRELAY_PORT", "PORT", "SAGEMAKER_BIND_TO_PORT", "PORT_HEALTH")
    return next((int(environ[name]) for name in names if environ.get(name, "").isdigit()), 8080)


def _ask(port: int) -> tuple[str | None, str | None]:
    """The phase that /health names, over HTTP and, where that is not what the port speaks, over HTTPS.

    Returns:
        The phase, or what is wrong.
    """
    try:
        return _phase(http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)), None
    except (http.client.HTTPException, ConnectionError):
        # The certificate names the public host, not this one; the answer never leaves the container.
        context = ssl._create_unverified_context()  # noqa: S323, SLF001
        secure = http.client.HTTPSConnection("127.0.0.1", port, timeout=TIMEOUT_S, context=context)
        try:
            return _phase(secure), None
        except (http.client.HTTPException, OSError) as error:
            return None, f"nothing answers on port {port}: {error}"
    except OSError as error:
        return None, f"nothing answers on port {port}: {error}"


def _phase(connection: http.client.HTTPConnection) -> str:
    try:
        connection.request("GET", "/health")
        body = json.loads(connection.getresponse().read())
    except ValueError as error:
        raise http.client.HTTPException(f"/health is no JSON: {error}") from error
    finally:
        connection.close()
    return str(body.get("phase"))


def check_worker(port: int, tables: tuple[Path, ...] = _TABLES) -> str | None:
    """Look for an established connection to a router in the kernel's table of this container.

    Returns:
        What is wrong, or None.
    """
    wanted = f"{port:04X}"
    for table in tables:
        if not table.is_file():
            continue
        for line in table.read_text().splitlines()[1:]:
            _, _, remote, state = line.split()[:4]
            if state == _ESTABLISHED and remote.endswith(f":{wanted}"):
                return None
    return f"no connection to a router's port {port}: still starting, or no router is reached"


def main(arguments: list[str]) -> int:
    checks = {
        "router": (check_router, 8000),
        "worker": (check_worker, 8001),
        "serve": (check_serve, serve_port()),
    }
    if not arguments or arguments[0] not in checks or not all(a.isdigit() for a in arguments[1:]):
        print(__doc__, file=sys.stderr)
        return 2
    check, default = checks[arguments[0]]
    problem = check(int(arguments[1]) if len(arguments) > 1 else default)
    print(problem or "ok")
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
