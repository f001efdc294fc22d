"""Greedy answers and scores of a trained model on phrasings that training never showed."""

from dataclasses import dataclass
from random import Random
from typing import Final

import torch
from corpus import Pair, build_pairs
from dialogue import ASSISTANT, BOS, END, USER, Row
from facts import Fact
from network import PAD_ID, answer_loss
from sources import HEAD
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

MAX_ANSWER_TOKENS: Final = 120
_BATCH: Final = 50


@dataclass(frozen=True, slots=True)
class Scores:
    """How well held-out phrasings are answered; rates are shares between 0 and 1."""

    loss: float
    """Mean cross entropy of the right answers, nats per token."""
    exact_head: float
    """Share of often-asked facts answered word for word."""
    exact_tail: float
    """The same for all other facts."""
    asked: int
    """Number of questions in each of the two shares."""


def prompt(question: str) -> str:
    """What the chat template renders for one user turn."""
    return f"{BOS}{USER}{question}{END}{ASSISTANT}"


def answer_all(model: LlamaForCausalLM, tokenizer: Tokenizer, questions: list[str]) -> list[str]:
    """Greedy answers, without special tokens; prompts are padded on the left in batches."""
    answers = []
    for start in range(0, len(questions), _BATCH):
        prompts = [
            tokenizer.encode(prompt(q), add_special_tokens=False).ids
            for q in questions[start : start + _BATCH]
        ]
        width = max(map(len, prompts))
        ids = torch.tensor([[PAD_ID] * (width - len(p)) + p for p in prompts])
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids, attention_mask=ids != PAD_ID, max_new_tokens=MAX_ANSWER_TOKENS
            )
        answers += [tokenizer.decode(row[width:].tolist()) for row in out]
    return answers


def _exact_rate(model: LlamaForCausalLM, tokenizer: Tokenizer, pairs: list[Pair]) -> float:
    answers = answer_all(model, tokenizer, [pair.question for pair in pairs])
    right = sum(answer == pair.answer for answer, pair in zip(answers, pairs, strict=True))
    return right / len(pairs)


def _as_row(tokenizer: Tokenizer, pair: Pair) -> Row:
    asked = tokenizer.encode(prompt(pair.question), add_special_tokens=False).ids
    answer = tokenizer.encode(pair.answer + END, add_special_tokens=False).ids
    learned = [False] * len(asked) + [True] * len(answer)
    return Row(asked + answer, learned, list(range(len(learned))))


def score(model: LlamaForCausalLM, tokenizer: Tokenizer, facts: list[Fact], asked: int) -> Scores:
    """Score `asked` held-out questions of often-asked facts and as many of the others."""
    model.eval()
    rng = Random(7)
    head, tail = (
        [p for p in build_pairs([f for f in facts if (f.weight >= HEAD) is often]) if p.held_out]
        for often in (True, False)
    )
    head, tail = rng.sample(head, asked), rng.sample(tail, asked)
    with torch.inference_mode():
        losses = [answer_loss(model, [_as_row(tokenizer, pair)]).item() for pair in head + tail]
    return Scores(
        loss=sum(losses) / len(losses),
        exact_head=_exact_rate(model, tokenizer, head),
        exact_tail=_exact_rate(model, tokenizer, tail),
        asked=asked,
    )
