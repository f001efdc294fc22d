"""`kvrelay up`: check everything, then hand a fleet of local processes to the supervisor."""

import atexit
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from kvrelay.cli.commands.shared import ROUTER_FLAGS, STACK_FLAGS, WORKER_FLAGS
from kvrelay.cli.flags import Bounds, to_arguments, to_environment
from kvrelay.cli.preflight import (
    CheckedModel,
    MemoryPlan,
    check_device,
    check_model,
    check_ports,
    check_tls,
    check_transport,
    plan_memory,
)
from kvrelay.cli.settings import own_thread_setting, thread_environment
from kvrelay.cli.units import format_count, format_size
from kvrelay_infra.console import Console
from kvrelay_infra.host import (
    count_gpus,
    free_port,
    read_cores,
    read_memory,
)
from kvrelay_infra.local import LocalFleet, Supervisor
from kvrelay_infra.process import ChildSpec
from kvrelay_protocol.errors import UsageError

_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104


@dataclass(frozen=True, slots=True)
class StackPlan:
    """Everything decided, nothing started."""

    model: CheckedModel
    name: str
    memory: MemoryPlan
    cores: int
    fleet: LocalFleet


def defaults(**overrides: object) -> SimpleNamespace:
    """The values of an `up` without arguments, for commands that start a stack of their own."""
    return SimpleNamespace(**({flag.dest: flag.default for flag in STACK_FLAGS} | overrides))


def plan_stack(values: SimpleNamespace) -> StackPlan:
    """All checks; raises before any process has started."""
    from kvrelay_engine.models.dtypes import DTYPE_BYTES, resolve_dtype

    check_tls(values)
    check_transport(values)
    gpus = count_gpus() if values.device.startswith(("cuda", "auto")) else 0
    check_device(values.device, gpus)
    check_ports(
        [
            (values.host, values.port, "--port"),
            (values.join_host, values.join_port, "--join-port"),
        ]
    )
    model = check_model(values.model, values.revision)
    on_gpu = gpus > 0 and not values.device.startswith("cpu")
    dtype = resolve_dtype(values.dtype, model.config.checkpoint_dtype)
    memory = plan_memory(
        model,
        values,
        dtype_bytes=DTYPE_BYTES[dtype],
        weight_bytes=1 if values.quantization == "int8" else DTYPE_BYTES[dtype],
        available=read_memory().available,
        on_gpu=on_gpu,
    )
    name = values.served_model_name or model.files.name
    cores = read_cores()
    settled = SimpleNamespace(
        **vars(values)
        | {
            "served_model_name": name,
            "max_model_len": memory.max_model_len,
            # Whatever happens to its objects, a worker that starts again loads the same weights.
            "revision": model.files.revision,
            # A router that starts again must come back where workers and clients look.
            "port": values.port or free_port(values.host),
            "join_port": values.join_port or free_port(values.join_host),
            # Nobody but our own workers may join.
            "join_token": values.join_token or secrets.token_urlsafe(24),
            "threads": values.threads or own_thread_setting() or 0,
            "supervised": True,
            **on_demand(values),
        }
    )
    return StackPlan(model, name, memory, cores, local_fleet(settled, model, cores, gpus))


def on_demand(values: SimpleNamespace) -> dict[str, object]:
    """What the router must know to start workers when they are needed; nothing where all always run.

    Raises:
        UsageError: more always run than there are, or a pool shall sleep that is never at zero.
    """
    if values.sleep and values.min != 0:
        least = "" if values.min is None else f" and not --min {values.min}"
        raise UsageError(
            f"--sleep {values.sleep:g} needs --min 0{least}: a pool sleeps where it would be at zero"
        )
    if values.min is None:
        return {}
    for pool in ("prefill", "decode"):
        most = getattr(values, pool)
        if values.min > most:
            raise UsageError(f"--min {values.min} is above --{pool} {most}; lower it or raise that")
    folder = Path(tempfile.mkdtemp(prefix="kvrelay-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return {
        "provider": f"local:{folder / 'scale'}",
        "scale_prefill": Bounds(values.min, values.prefill),
        "scale_decode": Bounds(values.min, values.decode),
    }


def local_fleet(values: SimpleNamespace, model: CheckedModel, cores: int, gpus: int) -> LocalFleet:
    """Command line and environment of every process; all values are settled."""
    http_host = _LOOPBACK.get(values.host, values.host)
    join_host = _LOOPBACK.get(values.join_host, values.join_host)
    join = f"[{join_host}]" if ":" in join_host else join_host
    roles = ["prefill"] * values.prefill + ["decode"] * values.decode
    threads = share_cores(cores, roles, values.threads)
    workers: list[ChildSpec] = []
    for position, (role, count) in enumerate(zip(roles, threads, strict=True)):
        number = position if role == "prefill" else position - values.prefill
        own = SimpleNamespace(
            **vars(values)
            | {
                "join": f"{join}:{values.join_port}",
                "name": f"{role}-{number}",
                "threads": count,
                "device": spread_device(values.device, position, gpus),
            }
        )
        workers.append(
            ChildSpec(
                own.name,
                _command(role, model, to_arguments(WORKER_FLAGS, own)),
                thread_environment(count) | to_environment(WORKER_FLAGS, own),
                preloaded=True,
            )
        )
    router = ChildSpec(
        "router",
        _command("router", model, to_arguments(ROUTER_FLAGS, values)),
        thread_environment(1) | to_environment(ROUTER_FLAGS, values),
    )
    provider = getattr(values, "provider", None)
    preload = "preload_workers" if model.files.remote is None else "preload_workers_with_s3"
    return LocalFleet(
        router=router,
        workers=workers,
        http_host=http_host,
        http_port=values.port,
        join_host=join_host,
        join_port=values.join_port,
        tls=values.tls_cert is not None,
        drain_grace_s=values.drain_grace,
        scale_socket=Path(provider.partition(":")[2]) if provider else None,
        running={"prefill": values.min, "decode": values.min} if provider else {},
        preload=f"kvrelay.cli.preload:{preload}",
        preload_environment=thread_environment(1),
    )


def _command(role: str, model: CheckedModel, arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "kvrelay.cli", role, model.files.reference, *arguments]


def share_cores(cores: int, roles: Sequence[str], fixed: int) -> list[int]:
    """Threads for each worker: equal shares, the rest to prefill workers, which compute the most.

    Workers together never have more threads than cores: OpenMP threads that wait for a core stall
    the whole team. The router keeps a core for itself where there are plenty.
    """
    if fixed:
        return [fixed] * len(roles)
    usable = cores - 1 if cores >= 8 else cores
    share, rest = divmod(usable, len(roles))
    order = sorted(range(len(roles)), key=lambda i: roles[i] != "prefill")
    extra = set(order[:rest])
    return [max(1, share + (i in extra)) if share else 1 for i in range(len(roles))]


def spread_device(device: str, position: int, gpus: int) -> str:
    """One GPU after the other, where there are several and none was named."""
    kind, _, index = device.partition(":")
    if kind == "cpu" or index or gpus < 2:
        return device
    return f"{kind}:{position % gpus}"


def describe(plan: StackPlan) -> str:
    """What is about to be served, and what it takes."""
    model, memory = plan.model, plan.memory
    files = model.files
    pinned = "" if files.revision is None else f"  {files.reference} at revision {files.revision}\n"
    return (
        f"{plan.name}: {model.config.architecture}, {format_count(model.parameters)} parameters\n"
        f"{pinned}"
        f"  each worker: {format_size(memory.weights)} weights + "
        f"{format_size(memory.kv_pool)} KV pool; {plan.cores} cores here"
    )


def ready_block(plan: StackPlan, values: SimpleNamespace) -> str:
    """The last lines of a start: where it is and how to use it."""
    fleet, memory = plan.fleet, plan.memory
    tokens = memory.num_blocks * values.block_size
    lines = [
        "",
        f"  url      {fleet.base_url}",
        f"  model    {plan.name}",
        f"  context  {memory.max_model_len} tokens; {tokens} KV tokens in each worker",
    ]
    if memory.limited:
        longest = plan.model.config.max_position_embeddings
        lines.append(f"           the model can do {longest}: raise --kv-memory")
    lines += [
        f"  chat     kvrelay chat --base-url {fleet.base_url}",
        f"  try      curl {'-k ' if fleet.tls else ''}{fleet.base_url}/v1/chat/completions \\",
        "             -H 'content-type: application/json' \\",
    ]
    if values.api_key:
        lines.append('             -H "authorization: Bearer $KVRELAY_API_KEY" \\')
    # A line break between two members is as good as a space, in JSON and inside the quotes.
    lines += [
        f"""             -d '{{"model": "{plan.name}",""",
        """                 "messages": [{"role": "user", "content": "What is len?"}]}'""",
        "",
    ]
    return "\n".join(lines)


def run_up(values: SimpleNamespace, command: str = "up") -> int:
    """Serve until stopped; returns the exit code."""
    console = Console()
    began = time.monotonic()
    plan = plan_stack(values)
    console.line(f"kvrelay {command}, {describe(plan)}")
    console.phase("checks", "model, ports, device, memory", seconds=time.monotonic() - began)

    def on_ready() -> None:
        console.phase("ready", "in all", seconds=time.monotonic() - began)
        console.line(ready_block(plan, values))

    drained = Supervisor(plan.fleet, console, on_ready=on_ready).run(handle_signals=True)
    console.line("stopped" if drained else "stopped at once")
    return 0 if drained else 130
