"""`kvrelay chat`: a conversation in the terminal, or line by line from a pipe."""

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TextIO

from kvrelay import ChatOptions, Client, KvrelayClientError, Message, Retries, Timeout
from kvrelay._config import DEFAULT_BASE_URL
from kvrelay.cli.commands.shared import ENGINE, POOLS, TIMES
from kvrelay.cli.reply import (
    Reply,
    card,
    describe_error,
    edit_lines,
    exit_on_sigterm,
    stream_reply,
)
from kvrelay.cli.stack import defaults, describe, plan_stack
from kvrelay.cli.suggest import unknown
from kvrelay_infra.console import Console
from kvrelay_infra.local import LocalStack

_HELP = "/reset  /model [NAME]  /trace  /save FILE  /quit"


@dataclass(slots=True)
class Conversation:
    """The turns so far, and what `/commands` do to them."""

    client: Client
    options: ChatOptions
    out: TextIO
    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    last: Reply | None = None

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self.last = None

    def say(self, text: str) -> None:
        """One turn. A stopped answer stays in the conversation, a failed one leaves no trace."""
        turn: list[Message] = [*self.messages, {"role": "user", "content": text}]
        self.last = stream_reply(self.client, turn, self.options, self.out)
        self.messages = [*turn, {"role": "assistant", "content": self.last.text}]

    def command(self, line: str) -> bool:
        """Carry out a `/command`; False ends the conversation."""
        name, _, argument = line.partition(" ")
        if name in {"/quit", "/exit"}:
            return False
        commands: dict[str, Callable[[str], None]] = {
            "/reset": self._reset,
            "/model": self._model,
            "/trace": self._trace,
            "/save": self._save,
            "/help": self._help,
        }
        action = commands.get(name)
        if action is None:
            self._print(unknown("command", name, [*commands, "/quit"]))
        else:
            action(argument.strip())
        return True

    def _print(self, text: str) -> None:
        self.out.write(text + "\n")
        self.out.flush()

    def _reset(self, _argument: str) -> None:
        self.reset()
        self._print("new conversation")

    def _model(self, argument: str) -> None:
        served = [model.id for model in self.client.models()]
        if argument in served:
            self.options["model"] = argument
        elif argument:
            self._print(unknown("model", argument, served))
        current = self.options.get("model") or (served[0] if served else "none")
        self._print(f"model {current}; served here: {', '.join(served)}")

    def _trace(self, _argument: str) -> None:
        self._print(card(self.last) if self.last else "nothing was asked yet")

    def _save(self, argument: str) -> None:
        if not argument:
            self._print("usage: /save FILE")
            return
        path = Path(argument).expanduser()
        content = {"model": self.options.get("model"), "messages": self.messages}
        try:
            path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            self._print(f"can't write {path}: {error.strerror}")
            return
        self._print(f"saved {len(self.messages)} messages to {path}")

    def _help(self, _argument: str) -> None:
        self._print(_HELP)


def run_chat(values: SimpleNamespace) -> int:
    """Talk until /quit or the end of input; returns the exit code."""
    exit_on_sigterm()
    try:
        with _server(values) as (base_url, key, model), Client(base_url, api_key=key) as client:
            conversation = Conversation(client, _options(values, model), sys.stdout, values.system)
            return _talk(conversation)
    except KvrelayClientError as error:
        print(f"kvrelay: {describe_error(error)}", file=sys.stderr)
        return 1


def _server(
    values: SimpleNamespace,
) -> "AbstractContextManager[tuple[str, str | None, str | None]]":
    """Base URL, key and model: of the server that was named, or of one that starts now."""
    found = None if values.base_url or _wants_own(values) else _running_server(values.api_key)
    if found is not None:
        print(f"kvrelay chat, {found} at {DEFAULT_BASE_URL}", flush=True)
        return nullcontext((DEFAULT_BASE_URL, values.api_key, found))
    if values.base_url:
        # Fails at once, where the conversation's own client would go on trying.
        with Client(values.base_url, api_key=values.api_key, retries=Retries(max=0)) as probe:
            served = [model.id for model in probe.models()]
        if values.model and values.model not in served:
            print(f"kvrelay: {unknown('model', values.model, served)}", file=sys.stderr)
        return nullcontext(
            (values.base_url, values.api_key, values.model or next(iter(served), None))
        )
    return _OwnServer(values)


def _wants_own(values: SimpleNamespace) -> bool:
    """A model or any setting of a stack was given: a server that runs already has its own."""
    flags = (*POOLS, *ENGINE, *TIMES)
    return bool(values.model or values.revision or values.served_model_name) or any(
        getattr(values, flag.dest) != flag.default for flag in flags
    )


def _running_server(api_key: str | None) -> str | None:
    """What a kvrelay server at the default address serves to this key; None where there is none."""
    quick = Timeout(connect=1, first_token=2, idle=2, total=2)
    try:
        with Client(DEFAULT_BASE_URL, api_key=api_key, timeout=quick, retries=Retries(max=0)) as c:
            ours = (model for model in c.models() if model.raw.get("owned_by") == "kvrelay")
            return next((model.id for model in ours), None)
    except KvrelayClientError:
        return None


class _OwnServer:
    """A stack for the length of the conversation."""

    def __init__(self, values: SimpleNamespace) -> None:
        own = vars(values) | {"port": 0, "join_port": 0, "api_key": ()}
        self._plan = plan_stack(defaults(**own))
        console = Console(relay=values.verbose)
        console.line(f"kvrelay chat, {describe(self._plan)}")
        self._stack = LocalStack(self._plan.fleet, console)

    def __enter__(self) -> tuple[str, str | None, str | None]:
        self._stack.__enter__()
        return self._stack.base_url, "", self._plan.name

    def __exit__(self, *exc: object) -> None:
        self._stack.__exit__(*exc)


def _options(values: SimpleNamespace, model: str | None) -> ChatOptions:
    return {
        "model": model,
        "max_tokens": values.max_tokens,
        "temperature": values.temperature,
        "top_p": values.top_p,
        "seed": values.seed,
    }


def _talk(conversation: Conversation) -> int:
    interactive = sys.stdin.isatty()
    if interactive:
        edit_lines()
        print(f"{_HELP}; Ctrl-C stops a reply, Ctrl-D ends", flush=True)
    while True:
        try:
            line = _read_line(interactive)
            if line is None or (line.startswith("/") and not conversation.command(line)):
                return 0
            if line and not line.startswith("/"):
                conversation.say(line)
        except KeyboardInterrupt:
            # At the prompt: drop the line. Before the first token: the request is cancelled.
            print()
            if not interactive:
                return 130
        except KvrelayClientError as error:
            print(f"kvrelay: {describe_error(error)}", file=sys.stderr)
            if not interactive:
                return 1


def _read_line(interactive: bool) -> str | None:
    """The next line, stripped; None at the end of input."""
    if interactive:
        try:
            return input("› ").strip()
        except EOFError:
            print()
            return None
    line = sys.stdin.readline()
    return line.strip() if line else None
