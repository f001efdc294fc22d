"""`POST /v1/completions`: the shape of its answers."""

from collections.abc import Mapping, Sequence
from typing import Any

from kvrelay_router.http import sse


class CompletionFrames:
    """One plain completion's answer; streamed chunks and the whole have the same object name."""

    def __init__(self, answer_id: str, created: int, model: str, *, include_usage: bool) -> None:
        self._base = {
            "id": answer_id,
            "object": "text_completion",
            "created": created,
            "model": model,
        }
        self._usage: dict[str, Any] = {"usage": None} if include_usage else {}
        self._spliced: dict[int, sse.SplicedFrame] = {}

    def _chunk(self, index: int, text: str, reason: str | None = None) -> dict[str, Any]:
        return {**self._base, "choices": [_choice(index, text, reason)], **self._usage}

    def opening(self, index: int) -> bytes:  # noqa: ARG002 (plain text has no opening)
        return b""

    def delta(self, index: int, text: str, usage: Mapping[str, Any] | None) -> bytes:
        if usage is not None:
            return sse.data_frame({**self._chunk(index, text), "usage": usage})
        if index not in self._spliced:
            self._spliced[index] = sse.SplicedFrame(self._chunk(index, sse.SplicedFrame.HOLE))
        return self._spliced[index].render(text)

    def finish(self, index: int, reason: str) -> bytes:
        return sse.data_frame(self._chunk(index, "", reason))

    def usage(self, usage: Mapping[str, Any]) -> bytes:
        return sse.data_frame({**self._base, "choices": [], "usage": usage})

    def whole(
        self,
        answers: Sequence[tuple[str, str]],
        usage: Mapping[str, Any],
    ) -> dict[str, Any]:
        choices = [_choice(index, text, reason) for index, (text, reason) in enumerate(answers)]
        return {**self._base, "choices": choices, "usage": usage}


def _choice(index: int, text: str, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
