"""Rotary position embeddings (arXiv 2104.09864) and the ways of stretching them.

`rotations` turns positions into cosines and sines once a forward pass; `rotate` applies them to
queries and keys. The scalings are those of transformers' rope_parameters, under their names.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions of a model, as its config.json describes them (hub).

    The kinds "dynamic" and "longrope" change the frequencies with the length of the text. Here a
    token at position p takes those of a text of length p + 1, as happens when tokens are generated
    one by one with a cache. So what the sampler draws and what the update recomputes agree.
    """

    theta: float = 10000.0
    kind: str = "default"  # default, linear, dynamic, llama3, yarn or longrope
    factor: float = 1.0  # by which the context is stretched
    original_length: int = 0  # tokens the model was first trained on
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0  # multiplies cosines and sines (yarn, longrope)
    partial: float = 1.0  # share of a head that is rotated
    short_factor: tuple[float, ...] = ()  # longrope: divisors of the frequencies up to
    long_factor: tuple[float, ...] = ()  # original_length, and beyond it


class Rotation(NamedTuple):
    """Cosines and sines, float32 [..., R / 2] for the R dimensions of a head that are rotated."""

    cos: Array
    sin: Array


def rotations(rope: Rope, head_dim: int, positions: Array) -> Rotation:
    """The rotation of each position.

    Args:
      rope: kind and parameters.
      head_dim: H; the first R = partial * H dimensions are rotated.
      positions: int32 [...].
    """
    angles = positions[..., None].astype(jnp.float32) * _frequencies(rope, head_dim, positions)
    scale = rope.attention_factor
    return Rotation(jnp.cos(angles) * scale, jnp.sin(angles) * scale)


def still(rotation: Rotation) -> Rotation:
    """The rotation that leaves everything as it is, for layers without positions (NoPE)."""
    return Rotation(jnp.ones_like(rotation.cos), jnp.zeros_like(rotation.sin))


def rotate(x: Array, rotation: Rotation) -> Array:
    """Rotate queries or keys, halves as Hugging Face stores them.

    Args:
      x: [..., N, H].
      rotation: [..., R / 2], one a token; dimensions behind R pass through.

    Returns:
      [..., N, H], same dtype.
    """
    half = rotation.cos.shape[-1]
    cos, sin = rotation.cos[..., None, :], rotation.sin[..., None, :]
    x32 = x.astype(jnp.float32)
    first, second, rest = x32[..., :half], x32[..., half : 2 * half], x32[..., 2 * half :]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*turned, rest] if rest.shape[-1] else turned, -1).astype(x.dtype)


def _frequencies(rope: Rope, head_dim: int, positions: Array) -> Array:
    """Radians a position: float32 [R / 2], or [..., R / 2] where they depend on the length."""
    half = int(head_dim * rope.partial) // 2
    exponents = jnp.arange(half, dtype=jnp.float32) / half
    inverse = 1.0 / rope.theta**exponents
    if rope.kind == "default":
        return inverse
    if rope.kind == "linear":
        return inverse / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, inverse)
    if rope.kind == "yarn":
        return _yarn(rope, inverse)
    lengths = positions[..., None].astype(jnp.float32) + 1.0
    if rope.kind == "dynamic":
        beyond = jnp.maximum(lengths, rope.original_length) / rope.original_length
        growth = (rope.factor * beyond - (rope.factor - 1.0)) ** (half / (half - 1))
        return 1.0 / (rope.theta * growth) ** exponents
    if rope.kind == "longrope":
        short, long = jnp.asarray(rope.short_factor), jnp.asarray(rope.long_factor)
        return inverse / jnp.where(lengths > rope.original_length, long, short)
    raise ValueError(f"rope: kind {rope.kind!r} is not implemented")


def _llama3(rope: Rope, inverse: Array) -> Array:
    """Llama 3.1: long waves are stretched, short ones kept, those between interpolated."""
    wavelength = 2 * math.pi / inverse
    low, high = rope.low_freq_factor, rope.high_freq_factor
    share = jnp.clip((rope.original_length / wavelength - low) / (high - low), 0.0, 1.0)
    return (1.0 - share) * inverse / rope.factor + share * inverse


def _yarn(rope: Rope, inverse: Array) -> Array:
    """YaRN (arXiv 2309.00071), section 3.2: a ramp over dimensions instead of wavelengths."""
    half = inverse.shape[0]

    def dimension(turns: float) -> float:
        """The dimension that makes so many turns within the original length."""
        waves = math.log(rope.original_length / (turns * 2 * math.pi))
        return half * waves / math.log(rope.theta)

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    width = high - low if high != low else 0.001
    stretched = jnp.clip((jnp.arange(half, dtype=jnp.float32) - low) / width, 0.0, 1.0)
    return inverse / rope.factor * stretched + inverse * (1.0 - stretched)
