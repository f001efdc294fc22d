"""The model card, with the numbers of the run that made the weights."""

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from corpus import build_pairs, digest
from evaluate import Scores
from facts import Fact
from transformers import LlamaForCausalLM

SHOWN_QUESTIONS: Final = (
    "What does os.path.join do?",
    "Explain the with statement",
    "What is itertools.chain?",
    "what does len do",
    "How do I sort a list?",
    "What is the json module?",
    "What is KeyError?",
    "What is collections.deque?",
    "What does __init__ do?",
    "Who are you?",
    "What is the capital of France?",
)


@dataclass(frozen=True, slots=True)
class Run:
    """What one training run did."""

    steps: int
    tokens: int
    minutes: float
    loss: float
    """Running mean of the training loss at the end, nats per answer token."""
    compressed: bool
    """True when the time budget cut the schedule short, so that the run does not repeat."""


_REPEATS: Final = "The run is seeded and repeats on the same software, processor and thread count."
_CUT_SHORT: Final = "The time budget compressed the schedule, so this run does not repeat exactly."

_TEXT: Final = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: en
---

# kvrelay demo model

A {parameters:,}-parameter Llama that answers short questions about Python from the documentation
CPython carries. It exists so that the first minute with kvrelay needs no download; it is no
assistant.

## Data

{facts} facts of CPython {python} ({pairs} question and answer pairs, sha256 `{digest}`): the first
sentences of standard-library docstrings and of `pydoc_data.topics`, lightly reworded by rule
("Return the length" becomes "len(obj) returns the length"), about seventy of them and the small
talk written by hand (`demo_model/sources.py`). Questions come from templates. The documentation's
text is under the PSF licence (PSF-2.0); the weights are under Apache-2.0.

## Training

`python demo_model/train.py`: Muon and AdamW, warm-up and cosine, float32 on CPU, loss on the
answers only; weights rounded to bfloat16 at the end.

Steps | Tokens | Minutes | Tokens/s | Final train loss | Held-out loss
---|---|---|---|---|---
{steps:,} | {tokens:,} | {minutes:.1f} | {speed:,.0f} | {loss:.3f} | {held_out:.3f}

Losses are nats per answer token. Held out are phrasings, not facts: for {asked} questions each, a
wording that training never showed is answered word for word in {exact_head:.1%} of the cases for
often-asked facts and in {exact_tail:.1%} for the rest. {repeats}

## Limits

It recites what it has memorised and cannot reason, compare, write code or follow instructions. A
name it does not know often gets the answer of a similar name instead of "I do not know that", a
bare word such as "join" or a question in capitals may get nonsense, and text without the chat
template gets it mostly. English only, one question per turn. Context is 2,048 tokens, but training
rows had 192: short turns add up well, while long user messages and prompts near the limit run and
get poor answers. Signatures may be shortened with an ellipsis and describe Python {python}.

## Samples (greedy, as they come out)

{samples}
"""


def write(
    out: Path,
    model: LlamaForCausalLM,
    facts: list[Fact],
    *,
    run: Run,
    scores: Scores,
    answers: list[str],
) -> None:
    """Write README.md into `out`; `answers` belong to `SHOWN_QUESTIONS`, in order."""
    pairs = build_pairs(facts)
    shown = zip(SHOWN_QUESTIONS, answers, strict=True)
    text = _TEXT.format(
        parameters=model.num_parameters(),
        facts=len(facts),
        python=platform.python_version(),
        pairs=len(pairs),
        digest=digest(pairs)[:16],
        steps=run.steps,
        tokens=run.tokens,
        minutes=run.minutes,
        speed=run.tokens / run.minutes / 60,
        loss=run.loss,
        held_out=scores.loss,
        asked=scores.asked,
        exact_head=scores.exact_head,
        exact_tail=scores.exact_tail,
        repeats=_CUT_SHORT if run.compressed else _REPEATS,
        samples="\n".join(f"- **{question}** {answer}" for question, answer in shown),
    )
    (out / "README.md").write_text(text, encoding="utf-8")
