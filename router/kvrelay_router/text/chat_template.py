"""The model's chat template: messages in, prompt text out.

Templates come from the model folder, never from a client. They still run in Jinja's immutable
sandbox, and a render is bounded in CPU time and size, because a template may be quadratic in what a
client sends.
"""

import json
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from kvrelay_protocol.errors import InvalidModel, InvalidRequest

MAX_RENDER_SECONDS = 2.0
MAX_RENDER_CHARS = 32 * 1024 * 1024
_MESSAGE_CHARS = 200


class _TooSlowError(Exception):
    """The render used up its CPU time."""


class _Budget(threading.local):
    """CPU time limit of the render that runs on this thread."""

    _soonest = _until = float("inf")

    def begin(self, seconds: float) -> None:
        self._soonest = time.monotonic() + seconds
        self._until = time.thread_time() + seconds

    def end(self) -> None:
        self._soonest = self._until = float("inf")

    def check(self) -> None:
        # CPU time of the thread, not wall clock: a busy machine must not fail honest renders. But
        # where not even the wall clock is that far, CPU time isn't: asking for it is a system call.
        if time.monotonic() > self._soonest and time.thread_time() > self._until:
            raise _TooSlowError


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks what the model wrote, for training; serving renders its body as is."""

    tags = {"generation"}  # noqa: RUF012 (jinja declares it as an instance attribute)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """A sandbox whose every attribute, item and call checks the render's budget."""

    def __init__(self, budget: _Budget) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
        )
        self._budget = budget
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def getattr(self, obj: Any, attribute: str) -> Any:
        self._budget.check()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self._budget.check()
        return super().getitem(obj, argument)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self._budget.check()
        return super().call(context, obj, *args, **kwargs)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which would change the prompt.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    # Local time without a zone: what templates get elsewhere.
    return datetime.now().strftime(pattern)  # noqa: DTZ005


class ChatTemplate:
    """One compiled template and the special tokens it may name."""

    def __init__(
        self,
        source: str,
        variables: Mapping[str, Any] | None = None,
        *,
        max_seconds: float = MAX_RENDER_SECONDS,
        max_chars: int = MAX_RENDER_CHARS,
    ) -> None:
        """Compile.

        Args:
            source: Jinja source, from the model folder.
            variables: `bos_token`, `eos_token` and the like.
            max_seconds: CPU time of one render.
            max_chars: size of one rendered prompt.

        Raises:
            InvalidModel: the source does not compile.
        """
        self._budget = _Budget()
        try:
            self._template = _Sandbox(self._budget).from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise InvalidModel(
                f"the model's chat template does not compile: line {error.lineno}: {error.message}",
            ) from None
        self._variables = dict(variables or {})
        self._max_seconds = max_seconds
        self._max_chars = max_chars

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt for a conversation.

        Raises:
            InvalidRequest: the template refuses the messages, or they cost too much to render.
        """
        self._budget.begin(self._max_seconds)
        try:
            return self._bounded(
                self._template.generate(
                    messages=[dict(message) for message in messages],
                    tools=None,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                    **self._variables,
                ),
            )
        except InvalidRequest:
            raise
        except _TooSlowError:
            raise _refused(f"take the chat template longer than {self._max_seconds:g} s") from None
        except jinja2.TemplateError as error:
            reason = str(error.message or type(error).__name__)[:_MESSAGE_CHARS]
            raise _refused(f"are refused by the model's chat template: {reason}") from None
        except Exception as error:
            # A template may add a string to None; the text of such errors can hold prompt text.
            raise _refused(f"break the model's chat template ({type(error).__name__})") from None
        finally:
            self._budget.end()

    def _bounded(self, pieces: Iterable[str]) -> str:
        kept: list[str] = []
        size = 0
        for piece in pieces:
            self._budget.check()
            kept.append(piece)
            size += len(piece)
            if size > self._max_chars:
                raise _refused(f"render to more than {self._max_chars} characters")
        return "".join(kept)


def _refused(what: str) -> InvalidRequest:
    return InvalidRequest(f"these messages {what}", param="messages")
