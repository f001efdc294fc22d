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
