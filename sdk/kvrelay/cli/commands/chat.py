"""`kvrelay chat`."""

from types import SimpleNamespace

from kvrelay.cli.command import Command
from kvrelay.cli.commands.shared import ENGINE, POOLS, TIMES
from kvrelay.cli.flags import Flag, api_key, base_url, boolean, integer, number, text

CHAT_FLAGS = (
    Flag(
        "model",
        "with --base-url the name to ask for, else what to serve: folder or hub id, none for the demo",
        text,
        metavar="MODEL",
    ),
    Flag("--base-url", "talk to this server", base_url, None, "server", "URL"),
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
    "Talk to a model: on the server named, else the one at http://127.0.0.1:8000,\n"
    "else on a stack started for the conversation.",
    CHAT_FLAGS,
    _run,
    epilog="In the conversation: /reset /model [NAME] /trace /save FILE /quit. Ctrl-C stops\n"
    "the reply, Ctrl-D ends. Input that is no terminal is read line by line.",
)
