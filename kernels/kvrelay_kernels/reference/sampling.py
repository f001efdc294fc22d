"""Sampling in torch."""

from typing import NamedTuple

import torch

SCALE = float(1 << 40)
LOG2_E = 1.44269504088896338700
LN2_HIGH = 6.93147180369123816490e-01
"""ln 2 in two parts; the first has enough trailing zeros that its product with an exponent is exact."""
LN2_LOW = 1.90821492927058770002e-10
TAYLOR = (
    1.0 / 6227020800,
    1.0 / 479001600,
    1.0 / 39916800,
    1.0 / 3628800,
    1.0 / 362880,
    1.0 / 40320,
    1.0 / 5040,
    1.0 / 720,
    1.0 / 120,
    1.0 / 24,
    1.0 / 6,
    1.0 / 2,
    1.0,
    1.0,
)
"""1/13! to 1/0!: the next term is below 2^-57 on the reduced range."""
SMALLEST_EXPONENT = -30.0
"""exp of it is below 2^-40: such weights are zero."""

_CPU_GROUP_BYTES = 2 << 20
"""On a CPU rows are taken in groups whose weights stay in cache."""
_CANDIDATES = 256
"""Most rows find both thresholds among this many largest weights; the others sort all of them."""
_LOW = 0xFFFFFFFF
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_PHILOX_ROUNDS = 10


class TokenLogprobs(NamedTuple):
    """Natural logarithms of the softmax, of one token a row and of the most likely ones."""

    logprob: torch.Tensor
    """`[rows]` float32, of the row's token."""
    rank: torch.Tensor
    """`[rows]` int64: how many tokens are at least as likely, so 1 is the most likely."""
    top_ids: torch.Tensor
    """`[rows, top]` int64, most likely first, the lowest id first among equals."""
    top_logprobs: torch.Tensor
    """`[rows, top]` float32."""


def greedy_reference(logits: torch.Tensor) -> torch.Tensor:
    """`kvrelay_kernels.sampling.greedy` on any device."""
    return logits.argmax(dim=-1)


def integer_weights(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """`floor(2^40 * exp((logit - max) / temperature))`, `[rows, vocabulary]` int64.

    The exponential is Cody and Waite's reduction and a Taylor polynomial, from additions and
    multiplications that are rounded one by one: every implementation gives the same bits, which no
    library's `exp` promises. The result is within one unit of the formula.
    """
    wide = logits.double()
    exponent = (wide - wide.amax(-1, keepdim=True)).div_(temperature.unsqueeze(1))
    exponent.clamp_(min=SMALLEST_EXPONENT)
    halvings = (exponent * LOG2_E).add_(0.5).floor_()
    reduced = exponent.sub_(halvings * LN2_HIGH).sub_(halvings * LN2_LOW)
    result = torch.full_like(reduced, TAYLOR[0])
    for coefficient in TAYLOR[1:]:
        result.mul_(reduced).add_(coefficient)
    # 2^(halvings + 40), put together from its bits: the product with it is exact.
    power = (halvings.long() + (1023 + 40)).bitwise_left_shift_(52).view(torch.float64)
    return result.mul_(power).long()


def sample_reference(
    logits: torch.Tensor,
    *,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """`kvrelay_kernels.sampling.sample` on any device."""
    rows, vocabulary = logits.shape
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
    weights = integer_weights(logits, temperature)
    threshold = torch.maximum(
        _top_k_top_p_threshold(weights, top_k, top_p), (min_p * SCALE).ceil().long()
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
    needed = (top_p * kept.double()).ceil().long().minimum(kept)
    reached = largest.cumsum(-1) >= needed.unsqueeze(1)
    p_index = reached.int().argmax(-1, keepdim=True)
    p_threshold = torch.where(top_p < 1.0, largest.gather(1, p_index).squeeze(1), 0)
    settled = (~has_k | (top_k <= width)) & (reached[:, -1] | (top_p >= 1.0))
    return torch.maximum(k_threshold, p_threshold), settled | (width == vocabulary)


def uniforms_reference(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`kvrelay_kernels.sampling.uniforms` on any device, in 64-bit integers that wrap around."""
    zero = torch.zeros_like(positions)
    counter = (positions & _LOW, (positions >> 32) & _LOW, zero, zero)
    key0, key1 = seeds & _LOW, (seeds >> 32) & _LOW
    for _ in range(_PHILOX_ROUNDS):
        product0, product1 = _wide_products(counter)
        counter = (
            ((product1 >> 32) & _LOW) ^ counter[1] ^ key0,
            product1 & _LOW,
            ((product0 >> 32) & _LOW) ^ counter[3] ^ key1,
            product0 & _LOW,
        )
        key0, key1 = (key0 + _PHILOX_WEYL[0]) & _LOW, (key1 + _PHILOX_WEYL[1]) & _LOW
    # The upper 53 bits of [word 1, word 0].
    bits = (counter[1] << 21) | (counter[0] >> 11)
    return bits.double() * 2.0**-53


def _wide_products(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    return counter[0] * _PHILOX_MULTIPLIERS[0], counter[2] * _PHILOX_MULTIPLIERS[1]


def apply_penalties_reference(
    logits: torch.Tensor,
    *,
    token_ids: torch.Tensor,
    pair_rows: torch.Tensor,
    output_counts: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
    repetition: torch.Tensor,
) -> None:
    """`kvrelay_kernels.sampling.apply_penalties` on any device."""
    values = logits[pair_rows, token_ids]
    factor = repetition[pair_rows]
    values = torch.where(values > 0, values / factor, values * factor)
    values -= frequency[pair_rows] * output_counts + presence[pair_rows] * (output_counts > 0)
    logits.index_put_((pair_rows, token_ids), values)


def token_logprobs_reference(logits: torch.Tensor, tokens: torch.Tensor, top: int) -> TokenLogprobs:
    """`kvrelay_kernels.sampling.token_logprobs` on any device."""
    at = tokens.unsqueeze(1)
    # Compared as logits, which rounding has not brought together yet.
    rank = (logits >= logits.gather(1, at)).sum(-1)
    top_ids = most_likely(logits, top)
    logprobs = logits.float().log_softmax(-1)
    return TokenLogprobs(
        logprobs.gather(1, at).squeeze(1), rank, top_ids, logprobs.gather(1, top_ids)
    )


def most_likely(logits: torch.Tensor, top: int) -> torch.Tensor:
    """Ids of the `top` largest logits of each row, the lowest id first among equals.

    Args:
        logits: `[rows, vocabulary]`, any float dtype up to 32 bits.
        top: 0 to the vocabulary's size.

    Returns:
        `[rows, top]` int64.
    """
    # `topk` leaves the order of equals open, so no two keys are equal: a float's bits, made to order
    # as integers do, then the complement of the id. Zero is added to make minus zero plus zero.
    bits = (logits.float() + 0.0).view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    ids = torch.arange(logits.shape[1], device=logits.device)
    keys = (ordered << 32) | (_LOW - ids)
    return _LOW - (keys.topk(top, dim=-1).values & _LOW)
