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
        self._chunks = sse.Chunks(self._base, usage_in_all=include_usage)
        self._texts: dict[int, sse.TextFrame] = {}

    def opening(self, index: int) -> bytes:  # noqa: ARG002 (plain text has no opening)
        return b""

    def delta(self, index: int, text: str, usage: Mapping[str, Any] | None) -> bytes:
        if usage is None:
            frame = self._texts.get(index)
            if frame is None:
                frame = self._texts[index] = self._chunks.with_text(index, '"text":', "")
            return frame.render(text)
        return self._chunks.render(index, f'"text":{sse.quote(text)}', usage=usage)

    def finish(self, index: int, reason: str) -> bytes:
        return self._chunks.render(index, '"text":""', reason)

    def usage(self, usage: Mapping[str, Any]) -> bytes:
        return self._chunks.without_choices(usage)

    def whole(
        self,
        answers: Sequence[tuple[str, str]],
        usage: Mapping[str, Any],
    ) -> dict[str, Any]:
        choices = [
            {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
            for index, (text, reason) in enumerate(answers)
        ]
        return {**self._base, "choices": choices, "usage": usage}
