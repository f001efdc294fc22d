"""From sampling parameters to tokens: rows are split into greedy and drawn ones on the host."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvrelay_engine.sampler.philox import uniforms
from kvrelay_kernels.sampling import greedy, sample
from kvrelay_protocol.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class PreparedSampling:
    """The parameters of a step's rows on the device; `rows` are those not decoded greedily."""

    num_rows: int
    rows: torch.Tensor
    """`[drawn]` int64."""
    temperature: torch.Tensor
    """`[drawn]` float64, as are `top_p`, `min_p` and `uniform`."""
    top_k: torch.Tensor
    """`[drawn]` int64."""
    top_p: torch.Tensor
    min_p: torch.Tensor
    uniform: torch.Tensor


def prepare_sampling(
    params: Sequence[SamplingParams], positions: Sequence[int], device: torch.device
) -> PreparedSampling:
    """Build the tensors of one step.

    Args:
        params: one a row.
        positions: position of the token each row draws, the generator's counter.
        device: where the logits will be.
    """
    rows = [index for index, row in enumerate(params) if not row.greedy]
    drawn = [params[index] for index in rows]
    draws = uniforms([row.seed for row in drawn], [positions[index] for index in rows])
    # One float64 table is one transfer; integers up to 2^53 pass through it unchanged.
    table = torch.tensor(
        [
            [row.temperature for row in drawn],
            [row.top_p for row in drawn],
            [row.min_p for row in drawn],
        ],
        dtype=torch.float64,
    )
    moved = torch.cat((table, torch.from_numpy(draws).unsqueeze(0))).to(device)
    integers = torch.tensor([rows, [row.top_k for row in drawn]], dtype=torch.int64).to(device)
    return PreparedSampling(
        num_rows=len(params),
        rows=integers[0],
        temperature=moved[0],
        top_k=integers[1],
        top_p=moved[1],
        min_p=moved[2],
        uniform=moved[3],
    )


def sample_tokens(logits: torch.Tensor, prepared: PreparedSampling) -> torch.Tensor:
    """Choose one token a row.

    Args:
        logits: `[rows, vocabulary]`, any float dtype.
        prepared: parameters of the same rows.

    Returns:
        `[rows]` int64 on the device of `logits`.
    """
    drawn = len(prepared.rows)
    if drawn == 0:
        return greedy(logits)
    chosen = logits if drawn == prepared.num_rows else logits.index_select(0, prepared.rows)
    tokens = sample(
        chosen,
        temperature=prepared.temperature,
        top_k=prepared.top_k,
        top_p=prepared.top_p,
        min_p=prepared.min_p,
        uniform=prepared.uniform,
    )
    if drawn == prepared.num_rows:
        return tokens
    return greedy(logits).index_copy_(0, prepared.rows, tokens)
