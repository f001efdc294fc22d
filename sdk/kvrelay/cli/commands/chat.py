"""`kvrelay chat`."""

from types import SimpleNamespace

from kvrelay.cli.command import Command
from kvrelay.cli.commands.shared import ENGINE, POOLS, TIMES
from kvrelay.cli.flags import Flag, api_key, boolean, integer, number, text

CHAT_FLAGS = (
    Flag(
        "model",
        "with --base-url the name to ask for, else what to serve: folder or hub id, none for the demo",
        text,
        metavar="MODEL",
    ),
    Flag("--base-url", "talk to this server instead of starting one", text, None, "server", "URL"),
    Flag("--api-key", "key for that server", api_key, None, "server", "KEY", secret=True),
    Flag("--revision", "branch, tag or commit of a hub id", text, None, "server", "REV"),
    Flag("--served-model-name", "name of the model that is started", text, None, "server", "NAME"),
    Flag("--verbose", "show what started processes print", boolean, False, "server", switch=True),
    Flag("--system", "system message", text, None, "answer", "TEXT"),
    Flag("--max-tokens", "longest answer", integer(1), 512, "answer", "N"),
    Flag("--temperature", "0 is greedy", number(0, 2), None, "answer", "T"),
    Flag("--top-p", "nucleus sampling", number(0, 1), None, "answer", "P"),
    Flag("--seed", "makes sampling repeatable", integer(0), None, "answer", "N"),
    *POOLS,
    *ENGINE,
    *TIMES,
)


def _run(values: SimpleNamespace) -> int:
    from kvrelay.cli.chat import run_chat

    return run_chat(values)


CHAT = Command(
    "chat",
    "Talk to a model. Without --base-url, a stack is started for the conversation.",
    CHAT_FLAGS,
    _run,
    epilog="In the conversation: /reset /model [NAME] /trace /save FILE /quit. Ctrl-C stops the\n"
    "reply, Ctrl-D ends. Input that is no terminal is read line by line.",
)
