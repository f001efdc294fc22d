"""Choice of the next token: the most likely one, or a draw from the filtered distribution.

A draw turns each row of logits into integer weights and inverts their running sum:

    weight[v] = floor(2^40 * exp((logit[v] - max) / temperature))
    top-k     drops weights below the k-th largest
    top-p     drops weights below t: the largest t whose weights >= t sum to at least top_p of those left
    min-p     drops weights below min_p * 2^40 (the most likely token weighs 2^40)
    token     = smallest v with  weight[0] + ... + weight[v] > floor(uniform * total)

Weights equal to a threshold stay, so the kept set does not depend on a sorting order. Integer sums are
exact in any order, and the exponential is made of exactly rounded steps: a row gives the same token
alone, in any batch, on any device and however that splits the sum. No row is sorted: the largest
threshold that keeps enough is found digit by digit, from histograms. Tokens less likely than 2^-40 of
the most likely one have weight zero; up to 2^22 tokens fit.

Sources: Fan et al., 2018 (arXiv:1805.04833) for top-k; Holtzman et al., 2019 (arXiv:1904.09751) for
top-p; Nguyen et al., 2024 (arXiv:2407.01082) for min-p; the order is that of Hugging Face transformers.
Cody and Waite, "Software Manual for the Elementary Functions", 1980, for the exponential.
"""

import torch

from kvrelay_kernels.checks import check_dtype, check_shape
from kvrelay_kernels.cpu.library import native
from kvrelay_kernels.reference.sampling import (
    TokenLogprobs,
    apply_penalties_reference,
    greedy_reference,
    sample_reference,
    token_logprobs_reference,
    uniforms_reference,
)

__all__ = [
    "TokenLogprobs",
    "apply_penalties",
    "greedy",
    "sample",
    "token_logprobs",
    "uniforms",
]

_MAX_VOCABULARY = 1 << 22


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """The most likely token of each row, the lowest id among equals.

    Args:
        logits: `[rows, vocabulary]`, any float dtype; no row has a NaN.

    Returns:
        `[rows]` int64.

    Raises:
        ValueError: `logits` has another number of dimensions.
    """
    check_shape("logits", logits, (None, None))
    if logits.device.type == "cuda":
        from kvrelay_kernels.cuda.sampling_greedy import greedy_cuda

        return greedy_cuda(logits)
    if (library := native(logits)) is not None:
        from kvrelay_kernels.cpu.sampling import greedy_cpu

        return greedy_cpu(library, logits)
    return greedy_reference(logits)


def sample(
    logits: torch.Tensor,
    *,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """Draw one token a row; every row has its own parameters.

    Args:
        logits: `[rows, vocabulary]`, float dtype up to 32 bits; minus infinity excludes a token.
        temperature: `[rows]` float64, above zero.
        top_k: `[rows]` int64; 0 keeps all.
        top_p: `[rows]` float64 in (0, 1]; 1 keeps all.
        min_p: `[rows]` float64 in [0, 1].
        uniform: `[rows]` float64 in [0, 1).

    Returns:
        `[rows]` int64.

    Raises:
        ValueError: shapes or dtypes do not match, or the vocabulary is too large.
    """
    check_shape("logits", logits, (None, None))
    check_dtype("logits", logits, torch.float32, torch.bfloat16, torch.float16)
    rows, vocabulary = logits.shape
    for name, tensor in (
        ("temperature", temperature),
        ("top_p", top_p),
        ("min_p", min_p),
        ("uniform", uniform),
    ):
        check_shape(name, tensor, (rows,))
        check_dtype(name, tensor, torch.float64)
    check_shape("top_k", top_k, (rows,))
    check_dtype("top_k", top_k, torch.int64)
    if vocabulary > _MAX_VOCABULARY:
        raise ValueError(f"a vocabulary of {vocabulary} is above {_MAX_VOCABULARY}")
    if logits.device.type == "cuda":
        from kvrelay_kernels.cuda.sampling_draw import sample_cuda as chosen
    elif (library := native(logits)) is not None:
        from kvrelay_kernels.cpu.sampling import sample_cpu

        return sample_cpu(
            library,
            logits,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            uniform=uniform,
        )
    else:
        chosen = sample_reference
    return chosen(
        logits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        uniform=uniform,
    )


def uniforms(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One number in [0, 1) a row, a function of the row's (seed, position) alone.

    Philox4x32-10 with the position as counter and the seed as key, 53 bits of its first two words: what
    `kvrelay_engine.sampler.philox.uniforms` computes on the host, without leaving the device.

    Source: Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.

    Args:
        seeds: `[rows]` int64, the bits of 64-bit keys.
        positions: `[rows]` int64, at least 0.

    Returns:
        `[rows]` float64.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    check_shape("seeds", seeds, (None,))
    check_shape("positions", positions, tuple(seeds.shape))
    check_dtype("seeds", seeds, torch.int64)
    check_dtype("positions", positions, torch.int64)
    if seeds.device.type == "cuda":
        from kvrelay_kernels.cuda.sampling_draw import uniforms_cuda

        return uniforms_cuda(seeds, positions)
    return uniforms_reference(seeds, positions)


def apply_penalties(
    logits: torch.Tensor,
    *,
    token_ids: torch.Tensor,
    pair_rows: torch.Tensor,
    output_counts: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
    repetition: torch.Tensor,
) -> None:
    """Make tokens that a row holds already less likely, in place.

        logit = logit / repetition  if logit > 0 else  logit * repetition
        logit = logit - (frequency * count + presence * (count > 0))

    Repetition applies to the tokens of prompt and output, the other two to those of the output.
    Sources: Keskar et al., 2019 (arXiv:1909.05858) for repetition, with the case of negative logits
    as in Hugging Face transformers; the OpenAI API's formula for the others.

    Args:
        logits: `[rows, vocabulary]` float32, changed.
        token_ids: `[pairs]` int64, the distinct tokens of each row.
        pair_rows: `[pairs]` int64, the row of each; no pair twice.
        output_counts: `[pairs]` int32, how often the output has the token; 0: only the prompt.
        presence: `[rows]` float32; 0 changes nothing.
        frequency: `[rows]` float32; 0 changes nothing.
        repetition: `[rows]` float32, above zero; 1 changes nothing.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    check_shape("logits", logits, (None, None))
    check_dtype("logits", logits, torch.float32)
    for name, tensor in (
        ("presence", presence),
        ("frequency", frequency),
        ("repetition", repetition),
    ):
        check_shape(name, tensor, (logits.shape[0],))
        check_dtype(name, tensor, torch.float32)
    check_shape("token_ids", token_ids, (None,))
    for name, tensor, dtype in (
        ("token_ids", token_ids, torch.int64),
        ("pair_rows", pair_rows, torch.int64),
        ("output_counts", output_counts, torch.int32),
    ):
        check_shape(name, tensor, (len(token_ids),))
        check_dtype(name, tensor, dtype)
    if logits.device.type == "cuda":
        from kvrelay_kernels.cuda.sampling_penalties import apply_penalties_cuda as chosen
    else:
        chosen = apply_penalties_reference
    chosen(
        logits,
        token_ids=token_ids,
        pair_rows=pair_rows,
        output_counts=output_counts,
        presence=presence,
        frequency=frequency,
        repetition=repetition,
    )


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, top: int) -> TokenLogprobs:
    """Natural logarithms of the softmax, of one token a row and of the most likely ones.

    Args:
        logits: `[rows, vocabulary]`, float dtype up to 32 bits.
        tokens: `[rows]` int64.
        top: how many of the most likely tokens, 0 to the vocabulary's size.

    Raises:
        ValueError: shapes or dtypes do not match, or `top` is out of range.
    """
    check_shape("logits", logits, (None, None))
    check_dtype("logits", logits, torch.float32, torch.bfloat16, torch.float16)
    check_shape("tokens", tokens, (logits.shape[0],))
    check_dtype("tokens", tokens, torch.int64)
    if not 0 <= top <= logits.shape[1]:
        raise ValueError(f"top is {top}, expected 0 to {logits.shape[1]}")
    if logits.device.type == "cuda":
        from kvrelay_kernels.cuda.sampling_logprobs import token_logprobs_cuda

        return token_logprobs_cuda(logits, tokens, top)
    return token_logprobs_reference(logits, tokens, top)
