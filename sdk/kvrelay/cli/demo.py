"""`kvrelay demo`: the whole path once, on free ports, with what happened to the request."""

import sys
from types import SimpleNamespace

from kvrelay import ChatOptions, Client, KvrelayClientError
from kvrelay.cli.reply import card, describe_error, edit_lines, exit_on_sigterm, stream_reply
from kvrelay.cli.stack import defaults, describe, plan_stack
from kvrelay_infra.console import Console
from kvrelay_infra.local import LocalStack
from kvrelay_protocol.errors import KvrelayError

_PROBED_BYTES = 8 * 1024 * 1024


def run_demo(values: SimpleNamespace) -> int:
    """Start, ask, show; then offer the prompt again on a terminal. Returns the exit code."""
    exit_on_sigterm()
    plan = plan_stack(defaults(**vars(values) | {"port": 0, "join_port": 0}))
    console = Console(relay=values.verbose)
    console.line(f"kvrelay demo, {describe(plan)}")
    # An empty key: one in the environment belongs to another server.
    with (
        LocalStack(plan.fleet, console) as stack,
        Client(stack.base_url, api_key="") as client,
    ):
        options: ChatOptions = {
            "model": plan.name,
            "max_tokens": values.max_tokens,
            "temperature": 0.0,  # the same answer every time
        }
        link: str | None = None
        prompt: str | None = values.prompt
        while prompt:
            print(f"\n> {prompt}\n", flush=True)
            try:
                reply = stream_reply(
                    client, [{"role": "user", "content": prompt}], options, sys.stdout
                )
            except KvrelayClientError as error:
                print(f"kvrelay: {describe_error(error)}", file=sys.stderr)
                if not values.verbose:
                    print("\n".join(stack.last_lines(12)), file=sys.stderr)
                return 1
            link = link or _probe_link()
            print(f"\n{card(reply, link)}", flush=True)
            prompt = _next_prompt()
        print("\nstopping", flush=True)
    return 0


def _probe_link() -> str | None:
    """What the transport reaches between two processes here: the demo's own messages are too small to
    tell. None where it can't be measured; the answer is what the demo is about.
    """
    from kvrelay_transfer.probe import probe

    try:
        result = probe("ucx://", [_PROBED_BYTES])
    except KvrelayError:
        return None
    rate = result.gb_per_s[_PROBED_BYTES]
    return f"{result.transport} reaches {rate:.2f} GB/s with messages of 8 MiB (probed)"


def _next_prompt() -> str | None:
    """Another question from a terminal; None ends."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return None
    edit_lines()
    try:
        return input("\nask again (empty line ends): ").strip() or None
    except (EOFError, KeyboardInterrupt):
        return None
