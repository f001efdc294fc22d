"""Request traces other people published, as planned requests.

Two formats, told apart by their first line:

- Azure LLM inference 2023 (CC-BY 4.0), CSV: `TIMESTAMP,ContextTokens,GeneratedTokens`;
- Mooncake (FAST'25, Apache-2.0), one JSON object a line: `timestamp` in milliseconds, `input_length`,
  `output_length` and `hash_ids`, one id for every 512 tokens of the prompt. Requests with equal ids
  share these tokens, which is what a prefix cache can use.
"""

import csv
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kvrelay_bench.serve.workload import PlannedRequest
from kvrelay_protocol.errors import UsageError

_AZURE_HEADER = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
MOONCAKE_BLOCK = 512
"""Tokens of one hash id."""


def read_trace(
    path: Path, *, limit: int | None = None, speed_up: float = 1.0, divide: float = 1.0
) -> list[PlannedRequest]:
    """Requests of a trace in the order of arrival, the first at 0.

    Args:
        path: CSV of the Azure format, or JSON lines of the Mooncake format.
        limit: take this many from the beginning.
        speed_up: divides the pauses between requests.
        divide: divides every length, of prompts, answers and shared blocks.

    Raises:
        UsageError: the file can't be read, or a line is not of its format; names file and line.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            first = file.readline()
            parse = _parser(path, first)
            lines = itertools.chain([first], file)
            rows = list(itertools.islice(_rows(path, lines, parse), limit))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UsageError(f"--trace {path} can't be read: {reason}") from None
    if not rows:
        raise UsageError(f"--trace {path} holds no request")
    rows.sort(key=lambda row: row.arrival_s)
    began = rows[0].arrival_s
    return [
        replace(
            row,
            number=number,
            arrival_s=(row.arrival_s - began) / speed_up,
            input_tokens=_divided(row.input_tokens, divide),
            output_tokens=_divided(row.output_tokens, divide),
            block_tokens=_divided(row.block_tokens, divide) if row.blocks else 0,
        )
        for number, row in enumerate(rows)
    ]


def _divided(tokens: int, divide: float) -> int:
    return max(1, round(tokens / divide))


def _parser(path: Path, first: str) -> Callable[[str], PlannedRequest | None]:
    if first.lstrip().startswith("{"):
        return _mooncake
    if next(csv.reader([first]), []) == _AZURE_HEADER:
        return _azure
    raise UsageError(
        f"--trace {path}: its first line is neither {','.join(_AZURE_HEADER)} (Azure) "
        "nor a JSON object (Mooncake)"
    )


def _rows(
    path: Path, lines: Iterable[str], parse: Callable[[str], PlannedRequest | None]
) -> Iterator[PlannedRequest]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse(line)
        except (ValueError, KeyError, TypeError) as error:
            reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise UsageError(f"--trace {path}, line {number}: {reason}") from None
        if row is not None:
            yield row


def _azure(line: str) -> PlannedRequest | None:
    cells = next(csv.reader([line]))
    if cells == _AZURE_HEADER:
        return None
    if len(cells) != len(_AZURE_HEADER):
        raise ValueError(f"{len(cells)} columns instead of {len(_AZURE_HEADER)}")
    arrival = datetime.fromisoformat(cells[0]).replace(tzinfo=UTC).timestamp()
    return PlannedRequest(0, arrival, _length(int(cells[1])), _length(int(cells[2])))


def _mooncake(line: str) -> PlannedRequest:
    row: Any = json.loads(line)
    if not isinstance(row, dict):
        raise TypeError("no JSON object")
    blocks = row.get("hash_ids", ())
    if not all(isinstance(block, int) for block in blocks):
        raise ValueError("hash_ids are not all whole numbers")
    return PlannedRequest(
        0,
        float(row["timestamp"]) / 1000,
        _length(int(row["input_length"])),
        _length(int(row["output_length"])),
        tuple(blocks),
        MOONCAKE_BLOCK,
    )


def _length(tokens: int) -> int:
    if tokens < 0:
        raise ValueError(f"a length of {tokens} tokens")
    return tokens
