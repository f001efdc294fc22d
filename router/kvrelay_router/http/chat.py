"""`POST /v1/chat/completions`: the shape of its answers."""

from collections.abc import Mapping, Sequence
from typing import Any

from kvrelay_router.http import sse


class ChatFrames:
    """One chat request's answer."""

    def __init__(self, answer_id: str, created: int, model: str, *, include_usage: bool) -> None:
        self._base = {"id": answer_id, "created": created, "model": model}
        self._chunks = sse.Chunks(
            {**self._base, "object": "chat.completion.chunk"}, usage_in_all=include_usage
        )
        self._texts: dict[int, sse.TextFrame] = {}

    def opening(self, index: int) -> bytes:
        return self._chunks.render(index, '"delta":{"role":"assistant","content":""}')

    def delta(self, index: int, text: str, usage: Mapping[str, Any] | None) -> bytes:
        if usage is None:
            frame = self._texts.get(index)
            if frame is None:
                frame = self._texts[index] = self._chunks.with_text(
                    index, '"delta":{"content":', "}"
                )
            return frame.render(text)
        return self._chunks.render(index, f'"delta":{{"content":{sse.quote(text)}}}', usage=usage)

    def finish(self, index: int, reason: str) -> bytes:
        return self._chunks.render(index, '"delta":{}', reason)

    def usage(self, usage: Mapping[str, Any]) -> bytes:
        return self._chunks.without_choices(usage)

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
