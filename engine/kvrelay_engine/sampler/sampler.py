"""From sampling parameters to tokens: rows are split into greedy and drawn ones on the host.

A step's logits go through bans and penalties, then temperature and the filters of the draw; logprobs
are taken from the logits as the model gave them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvrelay_engine.batch import SamplingHistory, TokenLogprobs
from kvrelay_engine.sampler.philox import uniforms
from kvrelay_engine.upload import upload
from kvrelay_kernels.sampling import apply_penalties, greedy, sample, token_logprobs
from kvrelay_kernels.sampling import uniforms as device_uniforms
from kvrelay_protocol.sampling import SamplingParams

_BANNED = float("-inf")


@dataclass(frozen=True, slots=True)
class PreparedPenalties:
    """Arguments of `apply_penalties`, one entry of `token_ids` for each distinct token of a row."""

    token_ids: torch.Tensor
    """`[pairs]` int64, as is `pair_rows`."""
    pair_rows: torch.Tensor
    output_counts: torch.Tensor
    """`[pairs]` int32."""
    presence: torch.Tensor
    """`[rows]` float32, as are `frequency` and `repetition`; neutral where a row has no penalty."""
    frequency: torch.Tensor
    repetition: torch.Tensor


@dataclass(frozen=True, slots=True)
class PreparedDraws:
    """Arguments of `sample` for the rows that are not decoded greedily."""

    rows: torch.Tensor
    """`[drawn]` int64."""
    temperature: torch.Tensor
    """`[drawn]` float64, as are `top_p`, `min_p` and `uniform`."""
    top_k: torch.Tensor
    """`[drawn]` int64."""
    top_p: torch.Tensor
    min_p: torch.Tensor
    uniform: torch.Tensor


@dataclass(frozen=True, slots=True)
class PreparedSampling:
    """The parameters of a step's rows on the device; what no row needs is None."""

    num_rows: int
    draws: PreparedDraws | None
    penalties: PreparedPenalties | None
    banned: tuple[torch.Tensor, torch.Tensor] | None
    """Rows and token ids, both `[bans]` int64."""
    logprobs: tuple[int | None, ...] | None
    """How many of the most likely tokens each row reports."""


def prepare_sampling(
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    device: torch.device,
    histories: Sequence[SamplingHistory | None] = (),
) -> PreparedSampling:
    """Build the tensors of one step.

    Args:
        params: one a row.
        positions: position of the token each row draws, the generator's counter.
        device: where the logits will be.
        histories: one a row, or none at all where no row has one.
    """
    wanted = tuple([row.logprobs for row in params])
    has_history = any(histories)
    return PreparedSampling(
        num_rows=len(params),
        draws=_prepare_draws(params, positions, device),
        penalties=_prepare_penalties(params, histories, device) if has_history else None,
        banned=_prepare_bans(histories, device) if has_history else None,
        logprobs=None if wanted.count(None) == len(wanted) else wanted,
    )


def sample_tokens(logits: torch.Tensor, prepared: PreparedSampling) -> torch.Tensor:
    """Choose one token a row.

    Args:
        logits: `[rows, vocabulary]`, any float dtype. Left as they are where the step reports
            logprobs; otherwise bans and penalties may be written into them.
        prepared: parameters of the same rows.

    Returns:
        `[rows]` int64 on the device of `logits`.
    """
    logits = _adjusted(logits, prepared)
    draws = prepared.draws
    if draws is None:
        return greedy(logits)
    every = len(draws.rows) == prepared.num_rows
    tokens = sample(
        logits if every else logits.index_select(0, draws.rows),
        temperature=draws.temperature,
        top_k=draws.top_k,
        top_p=draws.top_p,
        min_p=draws.min_p,
        uniform=draws.uniform,
    )
    return tokens if every else greedy(logits).index_copy_(0, draws.rows, tokens)


def sampled_logprobs(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    prepared: PreparedSampling,
    sequence_ids: Sequence[int],
) -> dict[int, TokenLogprobs]:
    """Logprobs of the rows that asked for them, by sequence id; waits for the device if any did.

    Args:
        logits: `[rows, vocabulary]` as the model gave them.
        tokens: `[rows]` int64, from `sample_tokens`.
        prepared: parameters of the same rows.
        sequence_ids: one a row.
    """
    if prepared.logprobs is None:
        return {}
    wanted = [(row, top) for row, top in enumerate(prepared.logprobs) if top is not None]
    if len(wanted) < prepared.num_rows:
        rows = torch.tensor([row for row, _ in wanted], device=logits.device)
        logits, tokens = logits.index_select(0, rows), tokens.index_select(0, rows)
    most = min(max(top for _, top in wanted), logits.shape[1])
    logprob, rank, top_ids, top_logprobs = (
        values.tolist() for values in token_logprobs(logits, tokens, most)
    )
    return {
        sequence_ids[row]: TokenLogprobs(
            logprob[at],
            rank[at],
            tuple(zip(top_ids[at][:top], top_logprobs[at][:top], strict=True)),
        )
        for at, (row, top) in enumerate(wanted)
    }


def _adjusted(logits: torch.Tensor, prepared: PreparedSampling) -> torch.Tensor:
    """Logits after bans and penalties; a copy where the logits themselves are still needed."""
    if prepared.banned is None and prepared.penalties is None:
        return logits
    adjusted = logits.float()
    if adjusted is logits and prepared.logprobs is not None:
        adjusted = logits.clone()
    if prepared.banned is not None:
        adjusted.index_put_(prepared.banned, adjusted.new_tensor(_BANNED))
    if prepared.penalties is not None:
        apply_penalties(
            adjusted,
            token_ids=prepared.penalties.token_ids,
            pair_rows=prepared.penalties.pair_rows,
            output_counts=prepared.penalties.output_counts,
            presence=prepared.penalties.presence,
            frequency=prepared.penalties.frequency,
            repetition=prepared.penalties.repetition,
        )
    return adjusted


def _prepare_draws(
    params: Sequence[SamplingParams], positions: Sequence[int], device: torch.device
) -> PreparedDraws | None:
    rows = [index for index, row in enumerate(params) if not row.greedy]
    if not rows:
        return None
    drawn = [params[index] for index in rows]
    temperature, top_p, min_p, row_indices, top_k = upload(
        [
            np.array([row.temperature for row in drawn], dtype=np.float64),
            np.array([row.top_p for row in drawn], dtype=np.float64),
            np.array([row.min_p for row in drawn], dtype=np.float64),
            np.array(rows, dtype=np.int64),
            np.array([row.top_k for row in drawn], dtype=np.int64),
        ],
        device,
    )
    return PreparedDraws(
        rows=row_indices,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        uniform=_uniforms(
            [row.seed for row in drawn], [positions[index] for index in rows], device
        ),
    )


def _uniforms(seeds: Sequence[int], positions: Sequence[int], device: torch.device) -> torch.Tensor:
    """The same numbers either way: on a CPU numpy is faster than torch, elsewhere one kernel is."""
    if device.type == "cpu":
        return torch.from_numpy(uniforms(seeds, positions))
    keys = np.array([seed % 2**64 for seed in seeds], dtype=np.uint64).view(np.int64)
    return device_uniforms(*upload([keys, np.array(positions, dtype=np.int64)], device))


def _prepare_penalties(
    params: Sequence[SamplingParams],
    histories: Sequence[SamplingHistory | None],
    device: torch.device,
) -> PreparedPenalties | None:
    counted = [
        (row, history.counts)
        for row, history in enumerate(histories)
        if history is not None and history.counts is not None
    ]
    if not counted:
        return None
    tokens = [counts.tokens for _, counts in counted]
    token_ids, pair_rows, output_counts, presence, frequency, repetition = upload(
        [
            # Joined and thereby copied: the counts go on growing.
            np.concatenate(tokens),
            np.repeat([row for row, _ in counted], [len(ids) for ids in tokens]),
            np.concatenate([counts.output_counts for _, counts in counted]),
            np.array([row.presence_penalty for row in params], dtype=np.float32),
            np.array([row.frequency_penalty for row in params], dtype=np.float32),
            np.array([row.repetition_penalty for row in params], dtype=np.float32),
        ],
        device,
    )
    return PreparedPenalties(
        token_ids=token_ids,
        pair_rows=pair_rows,
        output_counts=output_counts,
        presence=presence,
        frequency=frequency,
        repetition=repetition,
    )


def _prepare_bans(
    histories: Sequence[SamplingHistory | None], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor] | None:
    bans = [
        (row, token)
        for row, history in enumerate(histories)
        if history is not None
        for token in history.banned
    ]
    if not bans:
        return None
    rows, tokens = upload([np.array(column) for column in zip(*bans, strict=True)], device)
    return rows, tokens
