"""One fact per documented name or topic, read from the running interpreter's own library."""

import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from pydoc_data.topics import topics
from typing import Final

import sources
from prose import as_predicate, first_sentences, paragraphs, plain, signature, summary


class Kind(StrEnum):
    """What a fact is about; decides the phrasings of its questions."""

    FUNCTION = "function"
    METHOD = "method"
    CLASS = "class"
    EXCEPTION = "exception"
    MODULE = "module"
    STATEMENT = "statement"
    TOPIC = "topic"
    DUNDER = "special method"


@dataclass(frozen=True, slots=True)
class Fact:
    """An answer and the names under which people ask for it."""

    key: str
    """Unique: `os.path.join`, `module:json`, `statement:with`, `topic:truth`."""
    kind: Kind
    names: tuple[str, ...]
    """What a question may call it; the first is the full name."""
    answer: str
    weight: int
    """Sampling weight; 1 is a tail fact."""
    tasks: tuple[str, ...] = ()
    """Ends of "How do I ..." questions that this fact answers."""


_ARTICLE: Final = re.compile(r"^(A|An|The)\s")
_FINITE: Final = re.compile(
    r"\b(is|are|has|can|will|may|must|does|acts|compares|represents|supports|provides|works|"
    r"allows|takes|returns|manages|uses|contains|holds|calls|runs|makes|behaves|defines)\b"
)


def _describe(name: str, kind: Kind, call: str, text: str) -> str:
    """One answer sentence: name first, then what it does or is."""
    predicate = as_predicate(text)
    if kind in (Kind.FUNCTION, Kind.METHOD):
        return f"{name}{call} {predicate}" if predicate else f"{name}{call}: {text}"
    if kind is Kind.CLASS and predicate:
        return f"{name}{call} {predicate}"
    if text.startswith("Class "):
        return f"{name} is a class {text.removeprefix('Class ')}"
    if _ARTICLE.match(text) and not _FINITE.search(text.split(". ", maxsplit=1)[0]):
        return f"{name} is {text[0].lower()}{text[1:]}"
    article = "an" if kind is Kind.EXCEPTION else "a"
    return f"{name} is {article} {kind}: {text}"


def _describe_module(name: str, text: str) -> str:
    """A module's answer: its first sentence, and the next ones that begin with "This"."""
    text = re.split(r"(?<=\w\w[.!?]) (?=[A-Z(])(?!This )", text)[0]
    text = re.sub(rf"^(?i:module )?{re.escape(name)}(\.py)?( module)?\s*(-+|:)\s*", "", text)
    if text.startswith("This module "):
        return f"The {name} module {text.removeprefix('This module ')}"
    if re.match(rf"The {re.escape(name)} (module|package) ", text):
        return text
    return f"The {name} module: {text}"


def _kind_of(value: object) -> Kind | None:
    """Function, class or exception; None for data and modules."""
    if inspect.isclass(value):
        return Kind.EXCEPTION if issubclass(value, BaseException) else Kind.CLASS
    return Kind.FUNCTION if callable(value) else None


def _public_names(module: object) -> list[str]:
    """Sorted public names of a module: `__all__` where it has one."""
    listed = getattr(module, "__all__", None)
    names = listed if listed is not None else [n for n in vars(module) if not n.startswith("_")]
    return sorted(n for n in names if not n.startswith("_"))


def _is_own(module_name: str, module: object, value: object) -> bool:
    """Whether a name belongs to the module's interface and is not merely imported there."""
    if module_name == "builtins" or getattr(module, "__all__", None) is not None:
        return True
    home = getattr(value, "__module__", None)
    root = module_name.split(".", 1)[0]
    return home is None or home.lstrip("_").split(".", 1)[0] == root


def _own_docstring(value: object) -> str | None:
    """The docstring written for this very object; data and bare subclasses have none."""
    doc = getattr(value, "__doc__", None)
    if not isinstance(doc, str) or doc == type(value).__doc__:
        return None
    return None if doc in (object.__doc__, type.__doc__) else doc


def _member_facts(module_name: str, module: object, short: str, weight: int) -> Iterator[Fact]:
    """The fact about one public name of a module, if it has a docstring worth a sentence."""
    value = getattr(module, short, None)
    kind = _kind_of(value)
    text = summary(_own_docstring(value))
    if kind is None or text is None or not _is_own(module_name, module, value):
        return
    full = f"{module_name}.{short}".removeprefix("builtins.")
    call = "" if kind is Kind.EXCEPTION else signature(value, short, bound=False)
    yield Fact(full, kind, (full,), _describe(full, kind, call, text), weight)


def _module_fact(name: str, module: object) -> Fact | None:
    text = summary(getattr(module, "__doc__", None))
    if text is None and f"module:{name}" not in sources.ANSWERS_BY_HAND:
        return None
    answer = _describe_module(name, text or "")
    return Fact(f"module:{name}", Kind.MODULE, (name,), answer, sources.HEAD)


def module_facts() -> Iterator[Fact]:
    """Every listed module and its public functions, classes and exceptions."""
    for module_name, weight in sources.MODULE_WEIGHTS.items():
        module = importlib.import_module(module_name)
        own = _module_fact(module_name, module)
        if own:
            yield own
        for short in _public_names(module):
            full = f"{module_name}.{short}"
            share = sources.HEAD if full in sources.HEAD_MEMBERS else weight
            if share and full not in sources.SKIPPED_MEMBERS:
                yield from _member_facts(module_name, module, short, share)


def method_facts() -> Iterator[Fact]:
    """Public methods of the listed classes."""
    for class_name, weight in sources.CLASS_WEIGHTS.items():
        module_name, short_class = class_name.rsplit(".", 1)
        owner = getattr(importlib.import_module(module_name), short_class)
        shown = class_name.removeprefix("builtins.")
        for short in sorted(n for n in dir(owner) if not n.startswith("_")):
            value = inspect.getattr_static(owner, short)
            value = getattr(value, "__func__", value)
            text = summary(_own_docstring(value))
            if text is None or not (callable(value) or isinstance(value, property)):
                continue
            full = f"{shown}.{short}"
            call = signature(value, short, bound=True) if callable(value) else ""
            names = (full,) if shown == short_class else (full, f"{short_class}.{short}")
            yield Fact(full, Kind.METHOD, names, _describe(full, Kind.METHOD, call, text), weight)


def _topic_answer(topic: str) -> str | None:
    """First sentences of a topic's prose, its heading and grammar left out."""
    body = topics[topic].split("\n", 2)[2]
    return first_sentences(paragraphs(body))


def topic_facts() -> Iterator[Fact]:
    """Statements and language topics of `pydoc_data.topics`."""
    tables = ((Kind.STATEMENT, sources.STATEMENTS), (Kind.TOPIC, sources.TOPICS))
    for kind, table in tables:
        for topic, names in table.items():
            answer = _topic_answer(topic) if topic in topics else None
            if answer:
                yield Fact(f"{kind}:{topic}", kind, names, answer, sources.HEAD)


_ENTRY: Final = re.compile(
    r"^object\.(__\w+__)\((.*)\)\n(?:object\..*\n)*\n((?:   .*\n|\n)+)", re.MULTILINE
)


def dunder_facts() -> Iterator[Fact]:
    """Special methods, from the `object.__name__(...)` entries of their topics."""
    seen: set[str] = set()
    for topic in sources.DUNDER_TOPICS:
        for name, _, body in _ENTRY.findall(topics.get(topic, "")):
            text = first_sentences(paragraphs(inspect.cleandoc(body)))
            if text and name not in seen:
                seen.add(name)
                answer = f"{name} is a special method: {plain(text)}"
                yield Fact(name, Kind.DUNDER, (name,), answer, 2 * sources.TAIL)


def _own_names(fact: Fact, taken: set[str]) -> Fact:
    """The fact with those of its other names, and its last part, that nothing else claimed."""
    full, *others = fact.names
    if fact.kind not in (Kind.TOPIC, Kind.STATEMENT, Kind.MODULE):
        others.append(full.rsplit(".", 1)[-1])
    free = [name for name in others if name not in taken and len(name) > 1]
    taken.update(free)
    return replace(fact, names=(full, *free))


def _with_unique_names(facts: list[Fact]) -> list[Fact]:
    """Give each name to the first fact that owns it: `join` is one thing only."""
    taken = {fact.names[0] for fact in facts if fact.kind is not Kind.TOPIC}
    return [_own_names(fact, taken) for fact in facts]


def _with_tasks(facts: list[Fact]) -> list[Fact]:
    tasks: dict[str, list[str]] = {}
    for task, key in sources.HOW_TO.items():
        tasks.setdefault(key, []).append(task)
    unknown = set(tasks) - {fact.key for fact in facts}
    if unknown:
        message = f"how-to phrases point at facts that do not exist: {sorted(unknown)}"
        raise LookupError(message)
    return [replace(fact, tasks=tuple(tasks.get(fact.key, ()))) for fact in facts]


def _with_hand_written(facts: list[Fact]) -> list[Fact]:
    by_hand = sources.ANSWERS_BY_HAND
    return [replace(fact, answer=by_hand.get(fact.key, fact.answer)) for fact in facts]


def collect_facts() -> list[Fact]:
    """All facts in a fixed order, each key once."""
    unique: dict[str, Fact] = {}
    for source in (topic_facts, method_facts, module_facts, dunder_facts):
        for fact in source():
            unique.setdefault(fact.key, fact)
    order = {"module": 0, "class": 1, "exception": 1, "function": 1}
    ranked = sorted(unique.values(), key=lambda f: (-f.weight, order.get(f.kind, 2)))
    return _with_tasks(_with_hand_written(_with_unique_names(ranked)))
