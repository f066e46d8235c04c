"""How long a GRPO step takes at best, from bytes, FLOPs and published rates.

Sampling is bound by memory: each decoding step reads the weights, the caches and the logits.
Scoring and the update are bound by arithmetic. Collectives are added, not hidden behind it. The
shares below are assumptions about what programs reach of the published peaks, stated in the output.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import jax.numpy as jnp

from grpo_jax.config import Config
from grpo_jax.models.block import DecoderConfig
from grpo_jax.plan.devices import Device
from grpo_jax.plan.memory import Batch, Split, layer_parameters
from grpo_jax.rollout.sampler import cache_sizes

MATMUL = 0.4  # of the peak FLOP/s, in large products
DECODE = 0.6  # of the memory bandwidth, in decoding
LINKS = 0.7  # of the interconnect's bandwidth
DRAW_PASSES = 6  # times that drawing a token reads or writes the logits
TOP_P_PASSES = 4  # more of them with top-p: the total, and draws until all rows are in the nucleus
FLOAT32_RATE = 0.5  # of the bfloat16 peak, for float32 products (TPU: 3 to 6 bfloat16 passes)


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one step on one device, and what they are made of."""

    sampling: float
    reference: float
    update: float
    collectives: float
    decode_bound: str  # bandwidth or arithmetic
    update_flops: float  # of one device
    collective_bytes: float  # that one device sends

    @property
    def step(self) -> float:
        return self.sampling + self.reference + self.update + self.collectives


def times(cfg: Config, c: DecoderConfig, device: Device, split: Split) -> Times:
    """The expected times; scoring by the encoder overlaps the reference and is left out."""
    batch = Batch.of(cfg)
    width = jnp.dtype(cfg.model.dtype).itemsize
    peak = device.flops * (1.0 if width == 2 else FLOAT32_RATE) * MATMUL
    p = -(-batch.P // split.rows)
    sampling, bound = _sampling(cfg, c, device, batch, p, width, peak, split.tensor)
    forward = _forward_flops(c, batch) * p / split.tensor
    head = 2.0 * c.hidden_size * c.vocab_size * p * batch.G * batch.T / split.tensor
    reference = (forward + head) / peak if cfg.grpo.beta > 0 else 0.0
    # Backward: gradients of the inputs, and without LoRA of the weights; remat goes forward again.
    factor = 2 if cfg.model.lora.rank else 3
    again = forward if _products_again(cfg) else 0.0
    flops = (factor * (forward + head) + again) * cfg.grpo.num_iterations
    sent = _bytes(cfg, c, batch, split, p, width)
    # Neighbours in the mesh are neighbours in hosts: tensor first, then fsdp, then data.
    groups = (split.tensor, split.tensor * split.fsdp, split.devices)
    seconds = 0.0
    for part, group in zip(sent, groups, strict=True):
        within = group <= device.local(split.devices)
        seconds += part / ((device.link if within else device.network) * LINKS)
    return Times(sampling, reference, flops / peak, seconds, bound, flops, sum(sent))


def _sampling(
    cfg: Config,
    c: DecoderConfig,
    device: Device,
    batch: Batch,
    p: int,
    width: int,
    peak: float,
    tensor: int,
) -> tuple[float, str]:
    """Prefill and all decoding steps. The weights are split along tensor only (rollout/sampler)."""
    numbers = (c.num_layers * layer_parameters(c) + c.hidden_size * c.vocab_size) / tensor
    token = 2.0 * c.num_layers * c.num_kv_heads * c.head_dim * width / tensor  # a token's KV, bytes
    rows = p * batch.W
    passes = DRAW_PASSES + TOP_P_PASSES * (cfg.grpo.sampling.top_p < 1)
    room = _room(batch)
    read = numbers * width + (p * batch.S + rows * room) * token
    read += passes * rows * c.vocab_size * 4.0 / tensor
    attended = 4.0 * c.num_layers * c.num_heads * c.head_dim * (batch.S + room) / tensor
    flops = rows * (2.0 * numbers + attended)
    by_bytes, by_flops = read / (device.bandwidth * DECODE), flops / peak
    steps = batch.T * math.ceil(batch.G / batch.W)  # every completion as long as it may be
    prefill = p * batch.S * 2.0 * c.num_layers * layer_parameters(c) / (peak * tensor)
    bound = "bandwidth" if by_bytes >= by_flops else "arithmetic"
    return prefill + steps * max(by_bytes, by_flops), bound


def _room(batch: Batch) -> float:
    """Tokens for which a lane's own cache has room, all of them read, on the average of steps."""
    sizes = cache_sizes(batch.T)
    first = sum((size - full) * size for full, size in itertools.pairwise([0, *sizes])) / sizes[-1]
    rounds = math.ceil(batch.G / batch.W)  # in all but the first the cache is a ring
    return (first + (rounds - 1) * sizes[-1]) / rounds


def _forward_flops(c: DecoderConfig, batch: Batch) -> float:
    """FLOPs of the layers for one training row; completions see the prompt and themselves."""
    S, G, T = batch.S, batch.G, batch.T
    pairs = S * S + G * T * (S + T)  # both halves of the causal square are computed
    attention = 4.0 * c.num_heads * c.head_dim * pairs
    return c.num_layers * (2.0 * layer_parameters(c) * batch.places + attention)


def _products_again(cfg: Config) -> bool:
    """Whether the backward pass recomputes products; attention's own are left out."""
    return cfg.model.remat and cfg.model.remat_policy == "full"


def _bytes(
    cfg: Config, c: DecoderConfig, batch: Batch, split: Split, p: int, width: int
) -> tuple[float, float, float]:
    """What a device sends in a step along tensor (sums), fsdp (weights, gradients) and data."""
    f, t = split.fsdp, split.tensor
    layers = float(c.num_layers * layer_parameters(c))
    numbers = layers + c.hidden_size * c.vocab_size
    passes = batch.micro * batch.mini * cfg.grpo.num_iterations
    forward = 2 + _products_again(cfg)
    around = (f - 1) / f
    sent = numbers * width / t * around  # brought together to sample
    sent += passes * forward * layers * width / t * around
    sent += (cfg.grpo.beta > 0) * batch.micro * layers * width / t * around
    replicas = 0.0
    if not cfg.model.lora.rank:
        sent += passes * numbers * 4 / t * around
        replicas = 2 * numbers * 4 / (f * t) * (split.data - 1) / split.data
    summed = p * batch.places * c.hidden_size * width * 2 * (t - 1) / t
    forwards = forward * cfg.grpo.num_iterations + (cfg.grpo.beta > 0)
    return 2 * c.num_layers * summed * forwards, sent, replicas
