"""What is measured: so many prompts of one length, so many tokens of answer to each."""

import random
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

FIRST_TOKEN_ID = 256
"""Below are special tokens and bytes, in the benchmark models at least."""


class Listed(tuple[T, ...]):
    """A tuple that prints as it is typed: with commas."""

    __slots__ = ()

    def __str__(self) -> str:
        return ",".join(map(str, self))


@dataclass(frozen=True, slots=True)
class Point:
    """`8x32x64`: 8 sequences, 32 tokens in, 64 tokens out each."""

    batch: int
    input_len: int
    output_len: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.input_len}x{self.output_len}"

    @property
    def generated(self) -> int:
        return self.batch * self.output_len

    @property
    def tokens(self) -> int:
        """Prompt and generated tokens together."""
        return self.batch * (self.input_len + self.output_len)

    @property
    def is_prefill(self) -> bool:
        """Mostly prompt: total tokens per second say more than generated ones."""
        return self.input_len > 8 * self.output_len


TUNE_POINT = Point(2, 64, 4)
"""Where an engine tries its variants."""
CHECK_POINT = Point(4, 48, 16)
"""Where its answers are compared with the reference's."""


def parse_point(text: str) -> Point:
    """`BATCHxINPUTxOUTPUT`.

    Raises:
        ValueError: it is something else.
    """
    parts = text.strip().lower().split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError("must be BATCHxINPUTxOUTPUT, such as 8x32x64")
    return Point(*map(int, parts))


def parse_points(text: str) -> Listed[Point]:
    """Points with commas in between.

    Raises:
        ValueError: one of them is no point, or comes twice.
    """
    points = Listed(parse_point(part) for part in text.split(","))
    if len(set(points)) != len(points):
        raise ValueError("must not name a point twice")
    return points


def draw_prompts(point: Point, vocab_size: int, *, seed: int) -> list[list[int]]:
    """Token ids of a point's prompts; the same for the same seed."""
    drawn = random.Random(f"{point}/{seed}")
    low = min(FIRST_TOKEN_ID, vocab_size // 2)
    return [
        [drawn.randrange(low, vocab_size) for _ in range(point.input_len)]
        for _ in range(point.batch)
    ]
