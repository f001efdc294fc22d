"""The shell of a worker process: logging, signals, exit codes."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable

from kvrelay_protocol.errors import KvrelayError


def run_process(main: Callable[[asyncio.Event], Awaitable[None]]) -> int:
    """Run `main(shutdown)` until it returns; SIGINT or SIGTERM once sets `shutdown`, twice ends at once.

    Returns:
        The exit code: 0, or that of the `KvrelayError` printed as one line.
    """
    logging.basicConfig(level=os.environ.get("KVRELAY_LOG_LEVEL", "WARNING"), format="%(message)s")
    try:
        asyncio.run(_with_signals(main))
    except KvrelayError as error:
        print(f"error: {error.message}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


async def _with_signals(main: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    shutdown = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if shutdown.is_set():
            os._exit(130)
        shutdown.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    await main(shutdown)
