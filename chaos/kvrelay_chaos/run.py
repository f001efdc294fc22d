"""`kvrelay chaos` from values to verdict."""

import asyncio
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from kvrelay_chaos.conductor import Conductor
from kvrelay_chaos.faults import BY_NAME, KINDS, Surroundings
from kvrelay_chaos.leaks import Surplus
from kvrelay_chaos.ledger import Leak, Ledger
from kvrelay_chaos.load import Load, undisturbed
from kvrelay_chaos.plan import Plan, draw_plan
from kvrelay_chaos.questions import draw_questions
from kvrelay_chaos.report import print_result, write_result
from kvrelay_chaos.shape import Shape
from kvrelay_chaos.soak import Sampler, sampling
from kvrelay_chaos.stack import Stack

_QUIET_EVERY_S = 30.0


@dataclass(frozen=True, slots=True)
class Settings:
    """Of one run, apart from its plan."""

    values: SimpleNamespace
    """Settled flags of `kvrelay up`."""
    users: int
    questions: int
    deadline_s: float
    quiet_every_s: float = _QUIET_EVERY_S
    duration_s: float = 0.0
    """At least this long; longer where the plan is."""


def run_chaos(values: SimpleNamespace) -> int:
    """Draw or read the plan, carry it out, print and write the result; returns the exit code.

    Raises:
        UsageError: a plan that can't be read, a file that can't be written.
        StartupError: everything `kvrelay up` refuses.
    """
    plan = make_plan(values)
    if values.print_plan:
        print("\n".join(str(fault) for fault in plan.faults))
        return 0
    if values.save_plan is not None:
        plan.save(Path(values.save_plan))
    settings = make_settings(values, plan.shape)
    began = time.monotonic()
    ledger = carry_out(plan, settings, say=_say)
    seconds = time.monotonic() - began
    print_result(ledger, plan, seconds)
    print(f"\nresult: {write_result(values, ledger, plan, seconds)}")
    return 0 if ledger.passed else 1


def make_plan(values: SimpleNamespace) -> Plan:
    """The plan of a file, or the one that belongs to the seed."""
    if values.plan is not None:
        return Plan.load(values.plan, BY_NAME)
    shape = Shape(values.prefill, values.decode, values.routers)
    return draw_plan(
        KINDS, shape, count=values.faults, seed=values.seed, duration_s=values.duration or None
    )


def make_settings(values: SimpleNamespace, shape: Shape) -> Settings:
    """What the command was told of load and stack; the stack's flags are checked as `kvrelay up` would.

    Raises:
        StartupError: everything `kvrelay up` refuses.
    """
    from kvrelay.cli.commands.shared import STACK_FLAGS
    from kvrelay.cli.stack import defaults, plan_stack

    own = {
        **{f.dest: getattr(values, f.dest) for f in STACK_FLAGS if hasattr(values, f.dest)},
        "prefill": shape.prefill,
        "decode": shape.decode,
        "port": 0,
        "join_port": 0,
        "request_timeout": values.deadline,
    }
    planned = plan_stack(defaults(**own))
    model = {
        "model": str(planned.model.files.directory),
        "revision": None,
        "served_model_name": planned.name,
        "max_model_len": planned.memory.max_model_len,
    }
    return Settings(
        values=defaults(**own | model),
        users=values.users,
        questions=values.questions,
        deadline_s=values.deadline,
        duration_s=values.duration,
    )


def carry_out(plan: Plan, settings: Settings, *, say: Callable[[str], None]) -> Ledger:
    """Start a stack, run the plan under load, stop the stack; what happened is in the ledger."""
    folder = Path(tempfile.mkdtemp(prefix="kvrelay-chaos-"))
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(_carry_out(plan, settings, folder, say))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _carry_out(
    plan: Plan, settings: Settings, folder: Path, say: Callable[[str], None]
) -> Ledger:
    from kvrelay_bench.serve.stack import stop_on_signal

    surplus, ledger = Surplus(), Ledger(plan.counts())
    stack = Stack(plan.shape, settings.values, folder)
    say(f"starting {len(plan.shape.workers)} workers and {plan.shape.routers} router(s)")
    with stop_on_signal() as stop:
        async with stack:
            urls = [(name, stack.url(name)) for name in plan.shape.router_names]
            catalogue = await undisturbed(
                draw_questions(settings.questions, plan.seed),
                urls[0][1],
                users=settings.users,
                deadline_s=settings.deadline_s,
            )
            say(f"{len(catalogue)} answers without a fault; {len(plan.faults)} faults to come")
            load = Load(
                catalogue,
                urls,
                users=settings.users,
                deadline_s=settings.deadline_s,
                seed=plan.seed,
                epoch_of=stack.epoch,
                on_outcome=ledger.outcomes.append,
            )
            sampler = Sampler(stack.pids)
            conductor = Conductor(plan, Surroundings(stack, load.orders), load, ledger)
            async with load.running(), sampling(sampler):
                await conductor.run(
                    quiet_every_s=settings.quiet_every_s,
                    say=say,
                    stop=stop,
                    until_s=settings.duration_s,
                )
                await conductor.settle()
            ledger.growth = sampler.growth()
            ledger.restarts = {name: p.restarts for name, p in stack.processes.items()}
            ledger.last_lines = {name: list(p.log)[-40:] for name, p in stack.processes.items()}
            stubborn = await stack.stop()
        ledger.crashes += [str(ended) for ended in stack.unasked]
        ledger.leaks += [Leak(name, "process that SIGTERM did not end", 1) for name in stubborn]
    ledger.leaks += surplus.leaks()
    return ledger


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Uvloop where it is installed: clients and proxies share their cores with the stack."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _say(line: str) -> None:
    print(line, flush=True)
