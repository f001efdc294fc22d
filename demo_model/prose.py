"""From a docstring to one short answer: signatures off, markup off, first sentences kept."""

import inspect
import re
from typing import Final

PREFERRED_CHARS: Final = 110
"""Sentences are added while the answer stays below this many characters."""

MAX_CHARS: Final = 220
"""A first sentence longer than this many characters is no answer."""

MAX_SIGNATURE_CHARS: Final = 44
"""Longer signatures lose their last parameters to an ellipsis."""

_SIGNATURE_LINE: Final = re.compile(r"^[A-Za-z_][\w.]*\(.*?\)(?:\s*(?:-+>|=>|=|--|:)\s*(.*))?$")
_BAD_PARAGRAPH: Final = re.compile(
    r"^(>>>|\$|-|\*|=|\+|#|\d+\.|Usage|Example|Copyright|Written|Author|See also|Note|@|:)"
)
_BAD_SENTENCE: Final = re.compile(
    r"^((New|Changed|Deprecated|Added) in version|Attributes|Arguments|Args|Parameters|Typical)|"
    r"XXX|>>>| -- as for|intro stuff|^T = "
)
_EMPTY_LEAD_IN: Final = re.compile(r"follow|equivalent to|e\.g|below")
_RESULT_NAME: Final = re.compile(r"^(?:None|bool|int|str|list|[A-Za-z])[.,;]\s+")
_GRAMMAR: Final = "::="
_SENTENCE_END: Final = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!etc\.)(?<!vs\.)\s+(?=\S)")
_MARKUP: Final = (
    (re.compile(r":[a-z:+]+:`~?([^`]*)`"), r"\1"),
    (re.compile(r"``([^`]*)``"), r"\1"),
    (re.compile(r"`([^`']*)[`']"), r"\1"),
    (re.compile(r"(?<![\w*])\*(\w[\w ]*)\*(?![\w*])"), r"\1"),
    (re.compile(r"\s*\u2014\s*"), " - "),
    (re.compile(r"\s*\((?:see|See)[^()]*\)"), ""),
    (re.compile(r"\s*\[\d+\]"), ""),
    (re.compile(r"\s*<https?://[^>]*>"), ""),
    (re.compile(r"\s+"), " "),
)
_PLAIN: Final = str.maketrans(
    {"\u201c": '"', "\u201d": '"', "\u2019": "'", "\u2018": "'", "\u2026": "..."}
)

_VERB_WORDS: Final = (
    "abort accept acquire activate add advance allow append apply assert attach attempt await "
    "bind block build call cancel capture center change check clear close combine compare compile "
    "compute concatenate connect construct contain convert copy count create decode decorate "
    "decrement decrypt define delete deserialize detect determine dispatch display divide do draw "
    "dump emit empty enable disable encode encrypt end ensure enter escape evaluate examine exchange "
    "execute exit expand explain export extend extract fetch fill filter find finish flatten flush "
    "force forget format generate get give group handle hash implement import increment indent "
    "indicate initialize insert instantiate interpret intersect invoke issue iterate join keep kill "
    "launch leave let limit list listen load lock log look lookup loop make map mark match measure "
    "merge mirror modify move multiply normalize notify obtain open order output overwrite pack parse "
    "partition pass pause perform permit pickle pretty-print place poll pop prepare print process produce "
    "provide push put query raise randomize read rebuild receive reconstruct record recursively redirect "
    "reduce refresh register release remove rename render repeat replace report request reset resize "
    "resolve resume retrieve return reverse rotate round run save scan schedule search seek select "
    "send separate serialize set shuffle shutdown shut signal simulate skip sleep sort specify split "
    "start stop store strip submit subtract suspend swap switch test tell terminate throw tokenize "
    "trace translate traverse truncate try turn uncancel unify unlock unpack unregister unset update "
    "use validate verify wait walk warn watch wrap write yield"
)
_VERBS: Final = frozenset(_VERB_WORDS.split())
_ADVERBS: Final = frozenset({"recursively", "atomically", "asynchronously", "efficiently"})
_LINKED_VERB: Final = re.compile(
    r"\b(and|or|then) (return|raise|remove|yield|store|print|wait|write|set)\b(?! of)"
)


def third_person(verb: str) -> str:
    """`return` -> `returns`, `match` -> `matches`, `copy` -> `copies`."""
    if verb in {"do", "go"} or verb.endswith(("s", "sh", "ch", "x", "z")):
        return verb + "es"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ies"
    return verb + "s"


def as_predicate(text: str) -> str | None:
    """Turn an imperative ("Return the length.") into "returns the length.", or None if it is none."""
    sentence, *rest = _SENTENCE_END.split(text)
    words = sentence.split(" ")
    adverb = [words.pop(0).lower()] if words[0].lower() in _ADVERBS and len(words) > 1 else []
    verb = words[0].lower()
    if verb not in _VERBS or words[0].isupper():
        base = verb.removesuffix("s")
        if base not in _VERBS or not words[0].istitle():
            return None
    else:
        words[0] = third_person(verb)
    words[0] = words[0].lower()
    joined = " ".join([*adverb, *words])
    linked = _LINKED_VERB.sub(lambda m: f"{m[1]} {third_person(m[2])}", joined)
    return " ".join([linked, *rest])


def plain(text: str) -> str:
    """Drop reStructuredText markup, cross references and line breaks."""
    text = text.translate(_PLAIN)
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    return text.strip()


def _without_signatures(lines: list[str]) -> tuple[list[str], list[str]]:
    """Split leading `name(...) -> result` lines from the rest; returns (signature lines, rest)."""
    for index, line in enumerate(lines):
        if line.strip() and not _SIGNATURE_LINE.match(line.strip()):
            return lines[:index], lines[index:]
    return lines, []


def _result_text(signatures: list[str]) -> list[str]:
    """Prose after the arrow of the first signature line, if there is any worth a sentence."""
    match = _SIGNATURE_LINE.match(signatures[0].strip()) if signatures else None
    if match is None or match[1] is None:
        return []
    text = _RESULT_NAME.sub("", plain(match[1]))
    return [text[0].upper() + text[1:]] if len(text.split()) > 2 else []


def paragraphs(document: str) -> list[str]:
    """Prose paragraphs of a cleaned docstring, without grammar, examples, lists and headings."""
    blocks = re.split(r"\n\s*\n", document)
    kept = []
    for block in blocks:
        lines = block.strip("\n").splitlines()
        while len(lines) > 1 and re.fullmatch(r"[-=*~^]{3,}", lines[1].strip()):
            lines = lines[2:]
        text = plain("\n".join(lines))
        if not text or _GRAMMAR in block or _BAD_PARAGRAPH.match(text) or block.startswith("   "):
            continue
        kept.append(text)
    return kept


def _sentences(texts: list[str]) -> list[str]:
    """Sentences worth keeping; a lead-in to a list or an example keeps its text, not its colon."""
    kept: list[str] = []
    for raw in (raw for text in texts[:4] for raw in _SENTENCE_END.split(text)):
        lead_in = raw.endswith(":")
        if _BAD_SENTENCE.search(raw) or (lead_in and (kept or _EMPTY_LEAD_IN.search(raw))):
            continue
        kept.append(raw[:-1] + "." if lead_in else raw)
    return kept


def first_sentences(texts: list[str]) -> str | None:
    """Leading sentences of `texts` up to `PREFERRED_CHARS`; None when there is no usable one."""
    answer = ""
    for sentence in _sentences(texts):
        if answer and (len(answer) + len(sentence) > PREFERRED_CHARS or sentence[0].islower()):
            break
        answer = f"{answer} {sentence}".strip()
        if len(answer) > PREFERRED_CHARS // 2:
            break
    answer = answer.rstrip(" ;,")
    if not 12 <= len(answer) <= MAX_CHARS:
        return None
    return answer if answer.endswith((".", "!", "?")) else answer + "."


def summary(docstring: str | None) -> str | None:
    """The first sentences of a docstring as one line, or None."""
    if not docstring:
        return None
    signatures, rest = _without_signatures(inspect.cleandoc(docstring).splitlines())
    return first_sentences(_result_text(signatures) + paragraphs("\n".join(rest)))


def _parameter(parameter: inspect.Parameter) -> str:
    """One parameter as a reader writes it: no annotation, short literal defaults only."""
    name: str = parameter.name
    if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
        name = f"*{name}"
    elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
        name = f"**{name}"
    default = parameter.default
    if default is inspect.Parameter.empty:
        return name
    literal = isinstance(default, str | int | float | tuple | None) and len(repr(default)) <= 8
    return f"{name}={default!r}" if literal else f"{name}=..."


def _from_docstring(name: str, docstring: str | None) -> str:
    """The parenthesised part of a docstring's first line when it is a signature, else "()"-less."""
    first = inspect.cleandoc(docstring or "").split("\n", 1)[0].strip()
    match = re.match(rf"(?:[\w.]+\.)?{re.escape(name)}(\([^()]*(?:\([^()]*\)[^()]*)*\))", first)
    if match and len(match[1]) <= MAX_SIGNATURE_CHARS:
        return match[1]
    return "(...)" if match else ""


def _shown_parameters(parameters: list[inspect.Parameter]) -> list[str]:
    """Parameters as text, with the bare `*` in front of the first keyword-only one."""
    shown = []
    open_positions = True
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            open_positions = False
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and open_positions:
            shown.append("*")
            open_positions = False
        shown.append(_parameter(parameter))
    return shown


def signature(value: object, name: str, *, bound: bool) -> str:
    """Call signature such as `(a, *p)`, at most about `MAX_SIGNATURE_CHARS`; "" when unknown.

    `bound` leaves out the leading `self` or `cls` that the caller does not pass.
    """
    try:
        parameters = list(inspect.signature(value).parameters.values())  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return _from_docstring(name, getattr(value, "__doc__", None))
    if bound and parameters and parameters[0].name in {"self", "cls"}:
        parameters = parameters[1:]
    shown = _shown_parameters(parameters)
    if shown and shown[0] == "*args" and shown[-1].startswith("**"):
        return ""
    kept = list(shown)
    while kept and (len(", ".join(kept)) > MAX_SIGNATURE_CHARS or kept[-1] == "*"):
        kept.pop()
    if len(kept) < len(shown):
        kept.append("...")
    return f"({', '.join(kept)})"
