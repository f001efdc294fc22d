"""`POST /v1/chat/completions`: the shape of its answers."""

from collections.abc import Mapping, Sequence
from typing import Any

from kvrelay_router.http import sse


class ChatFrames:
    """One chat request's answer."""

    def __init__(self, answer_id: str, created: int, model: str, *, include_usage: bool) -> None:
        self._base = {"id": answer_id, "created": created, "model": model}
        # With include_usage every chunk has the key, null until the last.
        self._usage: dict[str, Any] = {"usage": None} if include_usage else {}
        self._spliced: dict[int, sse.SplicedFrame] = {}

    def _chunk(
        self,
        index: int,
        delta: Mapping[str, Any],
        reason: str | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        base = {**self._base, "object": "chat.completion.chunk"}
        return {**base, "choices": [choice], **self._usage}

    def opening(self, index: int) -> bytes:
        return sse.data_frame(self._chunk(index, {"role": "assistant", "content": ""}))

    def delta(self, index: int, text: str, usage: Mapping[str, Any] | None) -> bytes:
        if usage is not None:
            return sse.data_frame({**self._chunk(index, {"content": text}), "usage": usage})
        if index not in self._spliced:
            chunk = self._chunk(index, {"content": sse.SplicedFrame.HOLE})
            self._spliced[index] = sse.SplicedFrame(chunk)
        return self._spliced[index].render(text)

    def finish(self, index: int, reason: str) -> bytes:
        return sse.data_frame(self._chunk(index, {}, reason))

    def usage(self, usage: Mapping[str, Any]) -> bytes:
        base = {**self._base, "object": "chat.completion.chunk"}
        return sse.data_frame({**base, "choices": [], "usage": usage})

    def whole(
        self,
        answers: Sequence[tuple[str, str]],
        usage: Mapping[str, Any],
    ) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": reason,
            }
            for index, (text, reason) in enumerate(answers)
        ]
        return {**self._base, "object": "chat.completion", "choices": choices, "usage": usage}
