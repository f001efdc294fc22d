"""One engine behind JSON lines: load once, then answer requests until stdin ends.

    python -P main.py MODULE OPTIONS

MODULE is a file beside this one whose `Engine(options)` has `versions`, `tune`, `generate` and
`check`; its imports are the import phase. Replies carry `at`, seconds of the machine's monotonic
clock.
"""

import ctypes
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any, TextIO

_PR_SET_PDEATHSIG = 1


def main() -> int:
    module, options = sys.argv[1], json.loads(sys.argv[2])
    _die_with_parent()
    replies = _claim_stdout()
    _reply(replies, "started")
    defined = runpy.run_path(str(Path(__file__).with_name(f"{module}.py")))
    _reply(replies, "imported")
    engine = defined["Engine"](options)
    _reply(replies, "ready", versions=engine.versions(), phases=getattr(engine, "phases", {}))
    for line in sys.stdin:
        event, values = _answer(engine, json.loads(line))
        _reply(replies, event, **values)
    return 0


def _answer(engine: Any, request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    if request["do"] == "generate":
        return "generated", _generate(engine, request)
    if request["do"] == "tune":
        return "tuned", {"notes": engine.tune(request["prompts"], request["output_len"])}
    tokens, logprobs = engine.check(request["prompts"], request["output_len"], request["top"])
    return "checked", {"tokens": tokens, "logprobs": logprobs}


def _generate(engine: Any, request: dict[str, Any]) -> dict[str, Any]:
    begun = time.perf_counter()
    tokens = engine.generate(request["prompts"], request["output_len"])
    seconds = time.perf_counter() - begun
    return {"seconds": seconds, "tokens": tokens}


def _claim_stdout() -> TextIO:
    """The pipe for replies alone: whatever an engine prints goes to the log."""
    replies = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    return replies


def _reply(replies: TextIO, event: str, **values: Any) -> None:
    print(json.dumps({"event": event, "at": time.monotonic(), **values}), file=replies, flush=True)


def _die_with_parent() -> None:
    """A stopped process would outlive a killed parent for ever."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
