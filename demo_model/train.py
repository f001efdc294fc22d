"""Build the embedded demo model: corpus, tokenizer, weights, card.

`python demo_model/train.py --out DIR` writes a folder that transformers loads.

Everything is seeded; the same Python, torch and processor give the same weights, unless the
time budget cuts the run short.
"""

import argparse
import copy
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import card
import corpus
import evaluate
import network
import tokenizer as tokenizers_module
import torch
from dialogue import Sampler
from facts import Fact
from optimizer import Optimizer
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

DEFAULT_OUT: Final = (
    Path(__file__).resolve().parent.parent / "protocol" / "kvrelay_protocol" / "demo_model"
)
ROWS: Final = 16
"""Rows per optimizer step."""
ROW_TOKENS: Final = 192
WARM_UP: Final = 0.03
"""Share of the run in which the learning rate rises."""
UNHURRIED: Final = 0.4
"""Share of the time budget in which only the step count drives the schedule."""
FINAL_SHARE: Final = 0.02
"""Learning rate at the end, as a share of the peak."""
SCORED: Final = 150
"""Held-out questions per group in the final score."""


@dataclass(frozen=True, slots=True)
class Options:
    """Command line of a run."""

    out: Path
    steps: int
    minutes_budget: float
    """The schedule is compressed where it must be to end training within this time (minutes)."""
    threads: int
    seed: int
    save_every: int
    """Steps between checkpoints in `out`; 0 for none."""


def rate_share(progress: float) -> float:
    """Share of the peak learning rates: linear warm-up, then a cosine; `progress` is 0 to 1."""
    if progress < WARM_UP:
        return (progress + 1e-3) / (WARM_UP + 1e-3)
    falling = (progress - WARM_UP) / (1 - WARM_UP)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, falling)))
    return FINAL_SHARE + (1 - FINAL_SHARE) * cosine


def lateness(minutes: float, budget: float) -> float:
    """Progress that the clock demands: 0 in the unhurried part of the budget, 1 at its end."""
    return (minutes / budget - UNHURRIED) / (1 - UNHURRIED)


def fit(model: LlamaForCausalLM, sampler: Sampler, options: Options) -> card.Run:
    """Train to the end of the schedule; returns what the card says about it."""
    optimizer = Optimizer(model)
    started = time.monotonic()
    smooth, done, progress, compressed = 9.0, 0, 0.0, False
    model.train()
    while progress < 1:
        loss = network.answer_loss(model, list(sampler.rows(ROWS, ROW_TOKENS)))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(rate_share(progress))
        smooth += 0.02 * (loss.item() - smooth)
        done += 1
        minutes = (time.monotonic() - started) / 60
        progress = max(done / options.steps, lateness(minutes, options.minutes_budget))
        compressed = compressed or progress > done / options.steps
        if done % 20 == 0:
            speed = done * ROWS * ROW_TOKENS / minutes / 60
            print(f"step {done} loss {smooth:.3f} {minutes:.1f} min {speed:.0f} tok/s", flush=True)
        if options.save_every and done % options.save_every == 0:
            save(model, options.out)
    minutes = (time.monotonic() - started) / 60
    return card.Run(done, done * ROWS * ROW_TOKENS, minutes, smooth, compressed)


def save(model: LlamaForCausalLM, out: Path) -> LlamaForCausalLM:
    """Replace config and weights in `out`, rounded to bfloat16; returns the rounded model."""
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        rounded.save_pretrained(scratch)
        for file in sorted(Path(scratch).iterdir()):
            file.chmod(0o644)
            file.replace(out / file.name)
    return rounded.float().eval()


def prepare(options: Options) -> tuple[list[Fact], Tokenizer]:
    """Collect the facts and write the tokenizer."""
    facts = corpus.build_facts()
    tokenizer = tokenizers_module.train(corpus.tokenizer_texts(facts))
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizers_module.save(tokenizer, options.out)
    print(f"{len(facts)} facts, {tokenizer.get_vocab_size()} tokens in the vocabulary", flush=True)
    return facts, tokenizer


def parse() -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--minutes-budget", type=float, default=42.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=0)
    return Options(**vars(parser.parse_args()))


def main() -> None:
    """Build all files of the demo model."""
    options = parse()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(options.seed)
    facts, tokenizer = prepare(options)
    model = network.build()
    run = fit(model, Sampler(facts, tokenizer, options.seed), options)
    rounded = save(model, options.out)
    scores = evaluate.score(rounded, tokenizer, facts, SCORED)
    samples = evaluate.answer_all(rounded, tokenizer, list(card.SHOWN_QUESTIONS))
    card.write(options.out, rounded, facts, run=run, scores=scores, answers=samples)
    print(f"wrote {options.out}: {scores}")


if __name__ == "__main__":
    main()
