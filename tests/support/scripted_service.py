"""A `RequestService` that plays scripts, for tests of the HTTP edge, and a model folder for it."""

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from kvrelay_protocol.errors import ClientGone, KvrelayError
from kvrelay_router.requests.types import (
    Failed,
    Finished,
    FinishReason,
    Health,
    Path,
    PathKind,
    Placed,
    Queued,
    RequestEvent,
    RequestStats,
    RequestStream,
    Started,
    Tokens,
    ValidRequest,
    WorkerView,
)

PATH = Path(PathKind.DISAGGREGATED, "least_loaded", "prefill-0", "decode-0")
LOCAL = Path(PathKind.LOCAL, "short_prompt", None, "decode-0")
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


@dataclass(frozen=True, slots=True)
class Wait:
    """A pause in a script; None is for ever."""

    seconds: float | None = None


@dataclass(slots=True)
class Gate:
    """A pause until the test opens it, from any thread."""

    is_open: bool = False

    def open(self) -> None:
        self.is_open = True


Step = RequestEvent | Wait | Gate | Exception
Script = Callable[[ValidRequest], Sequence[Step]]


def stats(request: ValidRequest, completion_tokens: int, path: Path = PATH) -> RequestStats:
    """Plausible numbers for a finished request."""
    return RequestStats(
        path=path,
        prompt_tokens=len(request.prompt_tokens),
        completion_tokens=completion_tokens,
        cached_tokens=2,
        queue_s=0.001,
        prefill_s=0.01,
        kv_transfer_s=0.002,
        decode_s=0.1,
        time_to_first_token_s=0.013,
        kv_bytes=4_000_000,
        kv_transport="tcp",
    )


def answer(
    ids: Sequence[int],
    *,
    reason: FinishReason = FinishReason.STOP,
    path: Path = PATH,
    pause_s: float | None = 0.0,
) -> Script:
    """A script that gives these tokens one by one."""

    def script(request: ValidRequest) -> list[Step]:
        steps: list[Step] = [Queued(1, 0.1), Placed(path, 0), Started(2)]
        for token_id in ids:
            steps += [Tokens((token_id,)), Wait(pause_s)] if pause_s else [Tokens((token_id,))]
        return [*steps, Finished(reason, stats(request, len(ids), path))]

    return script


class _ScriptOverError(Exception):
    """The script ends without a terminal event."""


class ScriptedStream:
    """One request, playing its script."""

    def __init__(self, request: ValidRequest, steps: Sequence[Step]) -> None:
        self.request = request
        self.trace_id = TRACE_ID
        self.traceparent = f"00-{TRACE_ID}-b7ad6b7169203331-01"
        self.cancelled: list[str] = []
        self.stopped_early = False
        self.ended = asyncio.Event()
        self.sent_tokens = 0
        self._take_tokens: Callable[[tuple[int, ...]], None] | None = None
        self._steps = deque(steps)
        self._wake = asyncio.Event()

    def __aiter__(self) -> AsyncIterator[RequestEvent]:
        return self._play()

    def divert(self, take: Callable[[tuple[int, ...]], None]) -> None:
        self._take_tokens = take

    async def _play(self) -> AsyncIterator[RequestEvent]:
        try:
            while True:
                event = await self._next()
                if isinstance(event, Tokens):
                    self.sent_tokens += len(event.ids)
                    if self._take_tokens is not None:
                        self._take_tokens(event.ids)
                        continue
                yield event
                if isinstance(event, Finished | Failed):
                    return
        except _ScriptOverError:
            return
        finally:
            self.ended.set()

    async def _next(self) -> RequestEvent:
        while True:
            if self.cancelled:
                return Failed(ClientGone(self.cancelled[0]))
            if self.stopped_early:
                return Finished(FinishReason.STOP, stats(self.request, self.sent_tokens))
            if not self._steps:
                raise _ScriptOverError
            step = self._steps.popleft()
            if isinstance(step, Exception):
                raise step
            if isinstance(step, Gate):
                if not step.is_open:
                    self._steps.appendleft(step)
                    await self._pause(0.005)
            elif isinstance(step, Wait):
                await self._pause(step.seconds)
            else:
                return step

    async def _pause(self, seconds: float | None) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), seconds)

    def stop_early(self) -> None:
        self.stopped_early = True
        self._wake.set()

    def cancel(self, reason: str) -> None:
        self.cancelled.append(reason)
        self._wake.set()


class ScriptedService:
    """Keeps every stream it made, so tests can ask what became of it."""

    def __init__(self, script: Script | None = None) -> None:
        self.script: Script = script or answer([])
        self.refusal: KvrelayError | None = None
        self.streams: list[ScriptedStream] = []
        self.ready = True

    def submit(self, request: ValidRequest) -> RequestStream:
        if self.refusal is not None:
            raise self.refusal
        stream = ScriptedStream(request, self.script(request))
        self.streams.append(stream)
        return stream

    def health(self) -> Health:
        worker = WorkerView("decode-0", "decode", "cpu", 0, 0, 64, 60, 4, draining=False)
        if not self.ready:
            return Health(ready=False, phase="waiting_for_decode_worker")
        return Health(ready=True, phase="ready", workers=(worker,))

    def context_limit(self) -> int | None:
        return self.health().max_model_len

    @property
    def last(self) -> ScriptedStream:
        return self.streams[-1]


CORPUS = (
    "The quick brown fox jumps over the lazy dog. Schöne Grüße aus Köln! Привет, мир. "
    "日本語のテキスト 🙂🙃👩‍👩‍👧 emoji and tabs\tand\nnewlines; numbers 0123456789 and code: x = [1, 2]\n"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message.role not in ['system', 'user', 'assistant'] %}"
    "{{- raise_exception('unknown role') }}{%- endif %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def byte_level_backend(vocab_size: int = 400) -> tokenizers.Tokenizer:
    """A byte-level BPE, trained here and now."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([CORPUS] * 4, trainer)
    return backend


def write_model_folder(directory: FilePath, *, max_model_len: int = 512) -> FilePath:
    """Everything of a model but its weights."""
    directory.mkdir(parents=True, exist_ok=True)
    backend = byte_level_backend()
    backend.save(str(directory / "tokenizer.json"))
    files = {
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "max_position_embeddings": max_model_len,
            "vocab_size": backend.get_vocab_size(),
            "eos_token_id": 0,
        },
        "generation_config.json": {"eos_token_id": [0, 2], "temperature": 0.7, "top_k": 20},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "chat_template": CHAT_TEMPLATE,
        },
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    return directory
