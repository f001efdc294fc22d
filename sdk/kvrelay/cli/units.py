"""Sizes, durations and the other small values people type."""

import re

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|)")
_DURATION_UNITS = {"": 1.0, "s": 1.0, "ms": 0.001, "m": 60.0, "h": 3600.0}
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")


def _size_units() -> dict[str, int]:
    units = {"": 1, "b": 1}
    for power, letter in enumerate("kmgt", start=1):
        units |= {f"{letter}i": 1024**power, f"{letter}ib": 1024**power}
        units |= {letter: 1000**power, f"{letter}b": 1000**power}
    return units


_SIZE_UNITS = _size_units()


def parse_size(text: str) -> int:
    """Bytes of `268435456`, `256MiB`, `256Mi` or `256MB` (the last is decimal)."""
    match = _SIZE.fullmatch(text.strip())
    unit = _SIZE_UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ValueError("must be a size such as 256MiB or 2GiB")
    return int(float(match[1]) * unit)


def format_size(count: float) -> str:
    """Bytes for people: three digits at most, binary units."""
    value = float(count)
    for unit in _BINARY:
        if value < 1024 or unit == _BINARY[-1]:
            break
        value /= 1024
    digits = 0 if unit == "B" or value >= 100 else 1
    return f"{value:.{digits}f} {unit}".replace(".0 ", " ")


def parse_duration(text: str) -> float:
    """Seconds of `10`, `10s`, `500ms` or `2m`."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ValueError("must be a time such as 10, 500ms or 2m")
    return float(match[1]) * _DURATION_UNITS[match[2]]


def format_count(count: float) -> str:
    """1234567 as `1.23 M`."""
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return str(int(count))
