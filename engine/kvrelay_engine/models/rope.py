"""Rotary frequencies of a model, and the angles of a step's positions.

Sources: Su et al., 2021 (arXiv:2104.09864); linear interpolation, Chen et al., 2023
(arXiv:2306.15595); yarn, Peng et al., 2023 (arXiv:2309.00071); llama3, the smoothed split of
frequencies that Llama 3.1 was published with.
"""

import math

import torch

from kvrelay_engine.models.config import RopeConfig


def inverse_frequencies(rope: RopeConfig) -> torch.Tensor:
    """Angle per position of each pair of dimensions, `[rotary_dim / 2]` float32 on the CPU."""
    dims = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32)
    base = 1.0 / (rope.theta ** (dims / rope.rotary_dim))
    if rope.kind == "linear":
        return base / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, base)
    if rope.kind == "yarn":
        return _yarn(rope, base)
    # Dynamic scaling starts past the model's own length, which no sequence here may exceed.
    return base


def rotary_angles(
    positions: torch.Tensor, frequencies: torch.Tensor, attention_factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of a step.

    Args:
        positions: `[tokens]` int64.
        frequencies: `[angles]` float32 on the device of `positions`.
        attention_factor: multiplies both results.

    Returns:
        Two `[tokens, angles]` float32 tensors.
    """
    angles = positions.float().unsqueeze(1) * frequencies
    return angles.cos() * attention_factor, angles.sin() * attention_factor


def _llama3(rope: RopeConfig, base: torch.Tensor) -> torch.Tensor:
    """Long wavelengths are divided by the factor, short ones kept, those between blended."""
    wavelength = 2 * math.pi / base
    turns = rope.original_max_positions / wavelength
    span = rope.high_freq_factor - rope.low_freq_factor
    blend = ((turns - rope.low_freq_factor) / span).clamp(0, 1)
    return (1 - blend) * base / rope.factor + blend * base


def _yarn(rope: RopeConfig, base: torch.Tensor) -> torch.Tensor:
    """Dimensions that turn often within the original length are kept, slow ones interpolated."""

    def dimension(turns: float) -> float:
        length = rope.original_max_positions / (turns * 2 * math.pi)
        return rope.rotary_dim * math.log(length) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    # Equal bounds would divide by zero; any small width gives the same step.
    width = high - low or 0.001
    index = torch.arange(rope.rotary_dim // 2, dtype=torch.float32)
    slow = ((index - low) / width).clamp(0, 1)
    return base / rope.factor * slow + base * (1 - slow)
