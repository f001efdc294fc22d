"""The nearest name to a misspelt one."""

from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name that looks most like the word, if any does."""
    import difflib

    names = list(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return close[0]
    starting = [name for name in names if len(word) >= 2 and name.startswith(word)]
    return starting[0] if starting else None


def unknown(kind: str, word: str, known: Iterable[str]) -> str:
    """One line about a misspelt name."""
    near = nearest(word, known)
    return f"unknown {kind} {word}" + (f"; did you mean {near}?" if near else "")
