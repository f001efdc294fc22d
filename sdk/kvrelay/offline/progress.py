"""A progress bar with tokens per second; nothing where standard error is no terminal."""

import time
from collections.abc import Callable
from typing import Any, Protocol

from kvrelay.offline.outputs import RequestOutput


class Bar(Protocol):
    """What is used of tqdm."""

    def update(self, n: int = 1) -> Any: ...

    def close(self) -> None: ...

    def set_postfix_str(self, s: str, refresh: bool = True) -> None: ...


class Progress:
    """Counts finished prompts and the tokens on both sides."""

    def __init__(
        self, use_tqdm: bool | Callable[..., Bar], *, total: int, description: str
    ) -> None:
        """Args: `use_tqdm` is vLLM's: False for none, or a callable that makes the bar."""
        self._bar = _make_bar(use_tqdm, total, description)
        self._begun = time.monotonic()
        self._prompt_tokens = 0
        self._output_tokens = 0

    def finished(self, output: RequestOutput) -> None:
        """One prompt has all its answers."""
        if self._bar is None:
            return
        self._prompt_tokens += len(output.prompt_token_ids)
        self._output_tokens += sum(len(answer.token_ids) for answer in output.outputs)
        seconds = max(time.monotonic() - self._begun, 1e-9)
        self._bar.set_postfix_str(
            f"input {self._prompt_tokens / seconds:.2f} tokens/s, "
            f"output {self._output_tokens / seconds:.2f} tokens/s",
            refresh=False,
        )
        self._bar.update(1)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _make_bar(use_tqdm: bool | Callable[..., Bar], total: int, description: str) -> Bar | None:
    if use_tqdm is False:
        return None
    if use_tqdm is True:
        from tqdm.auto import tqdm

        # None: only on a terminal.
        bar: Bar = tqdm(total=total, desc=description, dynamic_ncols=True, disable=None)
        return bar
    return use_tqdm(total=total, desc=description, dynamic_ncols=True)
