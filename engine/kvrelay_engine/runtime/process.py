"""The shell of a worker process: logging, signals, exit codes."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import TypeVar

from kvrelay_protocol.errors import KvrelayError

INTERRUPTED = 130
"""Exit code of a process that ended at a signal without draining."""

T = TypeVar("T")


def run_process(
    start: Callable[[], T], serve: Callable[[T, asyncio.Event], Awaitable[None]]
) -> int:
    """Run `serve(start(), shutdown)` until it returns.

    While `start` runs there is nothing to drain: a signal ends the process at once. From then on
    SIGINT or SIGTERM sets `shutdown`, and a second one ends it at once.

    Returns:
        The exit code: 0, or that of the `KvrelayError` printed as one line.
    """
    logging.basicConfig(level=os.environ.get("KVRELAY_LOG_LEVEL", "WARNING"), format="%(message)s")
    try:
        started = start()
        asyncio.run(_with_signals(lambda shutdown: serve(started, shutdown)))
    except KvrelayError as error:
        print(f"kvrelay: {error.message}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


async def _with_signals(main: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    shutdown = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if shutdown.is_set():
            os._exit(INTERRUPTED)
        shutdown.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    await main(shutdown)
