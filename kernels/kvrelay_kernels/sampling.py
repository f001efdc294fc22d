"""Choice of the next token: the most likely one, or a draw from the filtered distribution.

A draw turns each row of logits into integer weights and inverts their running sum:

    weight[v] = floor(2^40 * exp((logit[v] - max) / temperature))
    top-k     drops weights below the k-th largest
    top-p     drops weights below t: the largest t whose weights >= t sum to at least top_p of those left
    min-p     drops weights below min_p * 2^40 (the most likely token weighs 2^40)
    token     = smallest v with  weight[0] + ... + weight[v] > floor(uniform * total)

Weights equal to a threshold stay, so the kept set does not depend on a sorting order. Integer sums are
exact in any order: a row gives the same token alone, in any batch and however a device splits the
sum. Tokens less likely than 2^-40 of the most likely one have weight zero; up to 2^22 tokens fit.

Sources: Fan et al., 2018 (arXiv:1805.04833) for top-k; Holtzman et al., 2019 (arXiv:1904.09751) for
top-p; Nguyen et al., 2024 (arXiv:2407.01082) for min-p; the order is that of Hugging Face transformers.
"""

import torch

from kvrelay_kernels.checks import check_dtype, check_shape

_SCALE = float(1 << 40)
_MAX_VOCABULARY = 1 << 22
_CPU_GROUP_BYTES = 2 << 20
"""On a CPU rows are taken in groups whose weights stay in cache."""
_CANDIDATES = 256
"""Most rows find both thresholds among this many largest weights; the others sort all of them."""


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """The most likely token of each row, the lowest id among equals.

    Args:
        logits: `[rows, vocabulary]`, any float dtype.

    Returns:
        `[rows]` int64.
    """
    check_shape("logits", logits, (None, None))
    return logits.argmax(dim=-1)


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
        logits: `[rows, vocabulary]`, any float dtype; minus infinity excludes a token.
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
    step = rows
    if logits.device.type == "cpu":
        step = max(1, _CPU_GROUP_BYTES // (8 * vocabulary))
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    for first in range(0, rows, step):
        group = slice(first, first + step)
        tokens[group] = _sample_group(
            logits[group],
            temperature=temperature[group],
            top_k=top_k[group],
            top_p=top_p[group],
            min_p=min_p[group],
            uniform=uniform[group],
        )
    return tokens


def apply_penalties(
    logits: torch.Tensor,
    *,
    token_ids: torch.Tensor,
    pair_rows: torch.Tensor,
    output_counts: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
    repetition: torch.Tensor,
) -> torch.Tensor:
    """Make tokens that a row holds already less likely, in place.

        logit = logit / repetition  if logit > 0 else  logit * repetition
        logit = logit - frequency * count - presence * (count > 0)

    Repetition applies to the tokens of prompt and output, the other two to those of the output.
    Sources: Keskar et al., 2019 (arXiv:1909.05858) for repetition, with the case of negative logits
    as in Hugging Face transformers; the OpenAI API's formula for the others.

    Args:
        logits: `[rows, vocabulary]` float32, changed.
        token_ids: `[pairs]` int64, the distinct tokens of each row, rows one after the other.
        pair_rows: `[pairs]` int64, the row of each; no pair twice.
        output_counts: `[pairs]` int32, how often the output has the token; 0: only the prompt.
        presence: `[rows]` float32; 0 changes nothing.
        frequency: `[rows]` float32; 0 changes nothing.
        repetition: `[rows]` float32, above zero; 1 changes nothing.

    Returns:
        `logits`.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
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
    values = logits[pair_rows, token_ids]
    factor = repetition[pair_rows]
    values = torch.where(values > 0, values / factor, values * factor)
    values -= frequency[pair_rows] * output_counts + presence[pair_rows] * (output_counts > 0)
    return logits.index_put_((pair_rows, token_ids), values)


def token_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Natural logarithms of the softmax, of one token a row and of the most likely ones.

    Args:
        logits: `[rows, vocabulary]`, any float dtype.
        tokens: `[rows]` int64.
        top: how many of the most likely tokens, 0 to the vocabulary's size.

    Returns:
        `[rows]` float32 logprobs of `tokens`; `[rows]` int64 ranks, the number of tokens at least as
        likely; `[rows, top]` int64 most likely tokens and `[rows, top]` float32 logprobs, descending.

    Raises:
        ValueError: shapes or dtypes do not match, or `top` is out of range.
    """
    check_shape("logits", logits, (None, None))
    check_shape("tokens", tokens, (logits.shape[0],))
    check_dtype("tokens", tokens, torch.int64)
    if not 0 <= top <= logits.shape[1]:
        raise ValueError(f"top is {top}, expected 0 to {logits.shape[1]}")
    at = tokens.unsqueeze(1)
    # Compared as logits, which rounding has not brought together yet.
    rank = (logits >= logits.gather(1, at)).sum(-1)
    top_ids = logits.topk(top, dim=-1).indices
    logprobs = logits.float().log_softmax(-1)
    return logprobs.gather(1, at).squeeze(1), rank, top_ids, logprobs.gather(1, top_ids)


def _sample_group(
    logits: torch.Tensor,
    *,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    wide = logits.double()
    exponent = (wide - wide.amax(-1, keepdim=True)) / temperature.unsqueeze(1)
    weights = (exponent.exp_() * _SCALE).long()
    threshold = torch.maximum(
        _top_k_top_p_threshold(weights, top_k, top_p), (min_p * _SCALE).ceil().long()
    )
    weights.masked_fill_(weights < threshold.unsqueeze(1), 0)
    running = weights.cumsum(-1)
    total = running[:, -1]
    # Rounding of the product must not reach the total, which no running sum exceeds.
    target = torch.minimum((uniform * total.double()).long(), total - 1)
    return torch.searchsorted(running, target.unsqueeze(1), right=True).squeeze(1)


def _top_k_top_p_threshold(
    weights: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor
) -> torch.Tensor:
    """The smallest weight that both filters keep, `[rows]` int64; 0 where they keep everything."""
    vocabulary = weights.shape[1]
    threshold = torch.zeros_like(top_k)
    filtered = ((top_k > 0) & (top_k < vocabulary)) | (top_p < 1.0)
    pending = filtered.nonzero().squeeze(1)
    width = min(_CANDIDATES, vocabulary)
    while len(pending):
        row_weights, row_k, row_p = weights[pending], top_k[pending], top_p[pending]
        found, settled = _threshold_among(row_weights, row_k, row_p, width)
        threshold[pending[settled]] = found[settled]
        pending = pending[~settled]
        width = vocabulary
    return threshold


def _threshold_among(
    weights: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Thresholds that the `width` largest weights give, and which rows they suffice for."""
    vocabulary = weights.shape[1]
    largest = weights.topk(width, dim=-1).values
    has_k = (top_k > 0) & (top_k < vocabulary)
    k_index = (top_k.clamp(1, width) - 1).unsqueeze(1)
    k_threshold = torch.where(has_k, largest.gather(1, k_index).squeeze(1), 0)
    kept = weights.masked_fill(weights < k_threshold.unsqueeze(1), 0).sum(-1)
    mass = top_p * kept.double()
    running = largest.cumsum(-1).double()
    reached = running >= mass.unsqueeze(1)
    p_index = reached.int().argmax(-1, keepdim=True)
    p_threshold = torch.where(top_p < 1.0, largest.gather(1, p_index).squeeze(1), 0)
    settled = (~has_k | (top_k <= width)) & (reached[:, -1] | (top_p >= 1.0))
    return torch.maximum(k_threshold, p_threshold), settled | (width == vocabulary)
