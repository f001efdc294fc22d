"""A supervisor in a process of its own: `run_supervisor.py JSON`; exits like `kvrelay up`."""

import json
import sys

from kvrelay_infra.console import Console
from kvrelay_infra.local import LocalFleet, Supervisor
from kvrelay_infra.process import ChildSpec
from kvrelay_protocol.errors import WorkerStartFailed

settings = json.loads(sys.argv[1])
console = Console()
fleet = LocalFleet(
    router=ChildSpec("router", settings["router"]),
    workers=[
        ChildSpec(name, command, preloaded="-m" in command)
        for name, command in settings["workers"].items()
    ],
    http_host="127.0.0.1",
    http_port=settings["http_port"],
    join_host="127.0.0.1",
    join_port=settings["join_port"],
    drain_grace_s=settings.get("drain_grace_s", 5.0),
    preload=settings["preload"],
)
supervisor = Supervisor(fleet, console, on_ready=lambda: console.line("serving"))
try:
    drained = supervisor.run(handle_signals=True)
except WorkerStartFailed as error:
    print(error, flush=True)
    sys.exit(error.exit_code)
sys.exit(0 if drained else 130)
