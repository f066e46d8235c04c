"""Bytes of one device from shapes: what is held all the time, and what each phase adds to it.

What is split how is asked of infra.mesh's own rules, and what a layer keeps for its backward pass
of jax itself (`jax.vjp` over abstract arrays), so neither can drift from the code. The rest is
arithmetic with these assumptions, each checked against XLA by benchmarks/plan_check.py:

- Rows (prompts) are split over data x fsdp, in every phase.
- Sampling holds the model in the compute dtype, whole along fsdp and split along tensor, as
  rollout/sampler.py gathers it.
- With remat the backward pass keeps each layer's input, or by its policy the products too, and one
  layer's intermediates; without it, every layer's.
- The loss's chunk keeps LOGIT_COPIES float32 arrays of the size of its logits.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding

from grpo_jax.config import Config, Lora
from grpo_jax.infra.mesh import AXES, param_shardings
from grpo_jax.learn import chunks
from grpo_jax.models import lora
from grpo_jax.models.block import DecoderConfig, DecoderLayer, Layout, all_rotations
from grpo_jax.models.decoder import POLICIES
from grpo_jax.plan.model import Trees

LOGIT_COPIES = 3  # of a chunk in the loss: scores, exponentials, its part of the head's gradient
DRAW_COPIES = 4  # of a decoding step's logits: scores, weights, blocks, truncated weights
FORWARD_SHARE = 0.2  # of a layer's intermediates, live at one time without a backward pass
NO_REMAT_EXTRA = 0.4  # of a layer's intermediates, live beside the stacked ones


@dataclasses.dataclass(frozen=True)
class Split:
    """A mesh: how many devices along each axis."""

    data: int
    fsdp: int
    tensor: int

    @property
    def devices(self) -> int:
        return self.data * self.fsdp * self.tensor

    @property
    def rows(self) -> int:
        """Parts into which a batch's prompts are split."""
        return self.data * self.fsdp

    def local(self, tree: Any) -> float:
        """Bytes of one device's share of a tree of shapes, by infra.mesh's rules."""
        mesh: Any = AbstractMesh((self.data, self.fsdp, self.tensor), AXES)
        shardings: list[NamedSharding] = jax.tree.leaves(param_shardings(mesh, tree))
        shares = zip(jax.tree.leaves(tree), shardings, strict=True)
        return float(sum(_size(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in shares))


@dataclasses.dataclass(frozen=True)
class Batch:
    """The numbers of a step's batch. P prompts, G completions of each, W lanes, S and T tokens."""

    P: int
    G: int
    W: int
    S: int
    T: int
    micro: int  # gradient_accumulation_steps
    mini: int  # num_minibatches

    @classmethod
    def of(cls, cfg: Config) -> Batch:
        g, d = cfg.grpo, cfg.data
        lanes = min(g.lanes or g.num_generations, g.num_generations)
        return cls(
            g.prompts_per_step, g.num_generations, lanes, d.max_prompt_length,
            d.max_completion_length, g.gradient_accumulation_steps, g.num_minibatches,
        )  # fmt: skip

    @property
    def places(self) -> int:
        """Of a training row: the prompt and all its completions, taken to be without padding."""
        return self.S + self.G * self.T


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of the fullest device."""

    held: dict[str, float]  # between two steps
    phases: dict[str, dict[str, float]]  # what each phase adds: open, sampling, reference, update

    def total(self, phase: str) -> float:
        """What is held, and the phase's own. Opening comes before the rest is there."""
        held = 0.0 if phase == "open" else sum(self.held.values())
        return held + sum(self.phases[phase].values())

    @property
    def peak(self) -> float:
        return max(map(self.total, self.phases))


def memory(
    cfg: Config,
    architecture: DecoderConfig,
    trees: Trees,
    split: Split,
    encoders: float = 0.0,
    backend: str = "tpu",
) -> Memory:
    """The memory of a GRPO stage on one device of a mesh.

    Args:
      cfg: the run's configuration.
      architecture, trees: of plan.model.
      split: the mesh.
      encoders: bytes of the encoder and the judge; they are on the first device of each process.
      backend: cpu, gpu or tpu, as jax.default_backend() says. TPUs do not copy each layer's weights
        out of gathered ones once more to sample (seen from their compiler); CPUs do, and GPUs are
        taken to. Chunks of logits are smaller on CPU.
    """
    batch = Batch.of(cfg)
    rank = cfg.model.lora.rank
    reference = rank > 0 or cfg.grpo.beta > 0
    held = {
        "frozen model (base)" if rank else "reference copy": _share(split, trees, "frozen")
        * reference,
        "trained parameters": _share(split, trees, "trained"),
        "optimizer state": _share(split, trees, "opt_state"),
        "encoder": encoders,
    }
    if cfg.forgetting.every and cfg.evaluation.retention:  # what the live gauge compares with
        held["base of the live gauge"] = _share(split, trees, "frozen")
    first = _share(split, trees, "base")
    phases = {
        "open": {"start weights": first, **held},
        "sampling": _sampling(cfg, architecture, trees, split, batch, backend),
    }
    if not rank:  # the state takes the start weights' place
        phases["open"]["start weights"] = 0.0
    if cfg.grpo.beta > 0:
        phases["reference"] = _forward(cfg, architecture, split, batch, backend)
    phases["update"] = _update(cfg, architecture, trees, split, batch, backend)
    return Memory(held, phases)


def _size(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


def _rows(prompts: int, split: Split) -> int:
    return -(-prompts // split.rows)


def _sampling(
    cfg: Config, c: DecoderConfig, trees: Trees, split: Split, batch: Batch, backend: str
) -> dict[str, float]:
    width = jnp.dtype(cfg.model.dtype).itemsize
    p = _rows(batch.P, split)
    t = split.tensor
    whole = sum(x.size * width for x in jax.tree.leaves(trees.base)) / t
    source = trees.frozen if cfg.model.lora.rank else trees.trained
    same = all(x.dtype == jnp.dtype(cfg.model.dtype) for x in jax.tree.leaves(source))
    copied = cfg.model.lora.rank > 0 or not same or split.fsdp * split.tensor > 1
    layers = sum(x.size * width for x in jax.tree.leaves(trees.base["layers"])) / t
    heads = c.num_kv_heads / (t if c.num_kv_heads % t == 0 else 1)
    kv = 2 * c.num_layers * heads * c.head_dim * width * p
    prefill = _layer_bytes(c, cfg, p, batch.S, 0, 1, 1) * FORWARD_SHARE
    drawn = DRAW_COPIES * p * batch.W * c.vocab_size * 4.0 / t
    tied = c.vocab_size * c.hidden_size * width * c.tie_word_embeddings / t
    return {
        "gathered weights": whole * copied,
        "layers' slices, output matrix": layers * (backend != "tpu" or not copied) + tied,
        "prompts' KV cache": float(kv * batch.S),
        "lanes' KV cache": float(kv * batch.W * max(batch.T - 1, 1)),
        "prefill or draw": max(prefill, drawn),
        "rollout": p * batch.G * batch.T * (4 + 4 + 8.0),
    }


def _forward(
    cfg: Config, c: DecoderConfig, split: Split, batch: Batch, backend: str
) -> dict[str, float]:
    """The reference's log-probs: a forward pass whose intermediates live for one layer."""
    p = _rows(batch.P // batch.micro, split)
    width = jnp.dtype(cfg.model.dtype).itemsize
    per_layer = _layer_bytes(c, cfg, p, batch.S, batch.G, batch.T, split.tensor)
    return {
        "activations": p * batch.places * c.hidden_size * width + per_layer * FORWARD_SHARE,
        "logits chunk": _chunk(c, p, batch, split, backend),
        "output matrix": c.vocab_size * c.hidden_size * width * (split.fsdp > 1) / split.tensor,
        "gathered layer": _gathered(cfg, c, split),
    }


def _update(
    cfg: Config, c: DecoderConfig, trees: Trees, split: Split, batch: Batch, backend: str
) -> dict[str, float]:
    p = _rows(batch.P // (batch.mini * batch.micro), split)
    width = jnp.dtype(cfg.model.dtype).itemsize
    x = float(p * batch.places * c.hidden_size * width)
    layer = _layer_bytes(c, cfg, p, batch.S, batch.G, batch.T, split.tensor)
    gradients = _share(split, trees, "trained")
    if batch.micro > 1:  # the sum so far, in float32, beside the micro-batch's own
        gradients = _share(split, trees, "sums") + _share(split, trees, "layers")
    kept = layer
    if cfg.model.remat and cfg.model.remat_policy == "full":
        kept = x
    elif cfg.model.remat:
        kept = _layer_bytes(c, cfg, p, batch.S, batch.G, batch.T, split.tensor, products=True)
    tokens = p * batch.G * batch.T
    hidden = 2.0 * tokens * c.hidden_size * width
    whole = c.vocab_size * c.hidden_size / split.tensor
    table = whole * width * (split.devices > 1 or width != 4)
    if not cfg.model.lora.rank:
        table += whole * 4  # the head's gradient adds up over the chunks
    head = _chunk(c, p, batch, split, backend) * LOGIT_COPIES + table
    working = layer * (1.0 if cfg.model.remat else NO_REMAT_EXTRA) + _gathered(cfg, c, split, 2)
    return {
        "gradients": gradients,
        "saved activations": c.num_layers * kept + hidden,
        "one layer's work" if working >= head else "head and logits chunk": max(working, head),
        "batch": p * batch.mini * batch.micro * batch.G * batch.T * 13.0,
    }


@functools.lru_cache(maxsize=4096)
def _share(split: Split, trees: Trees, name: str) -> float:
    """Bytes of one device's share of a tree of `trees`; sums: `trained` in float32."""
    if name == "sums":
        return split.local(jax.tree.map(lambda x: x.update(dtype=jnp.float32), trees.trained))
    if name == "layers":
        return split.local({"layers": trees.trained["layers"]})
    return split.local(getattr(trees, name))


def _chunk(c: DecoderConfig, p: int, batch: Batch, split: Split, backend: str) -> float:
    """Bytes of a device's logits of one chunk: never more than learn.chunks.LOGITS numbers."""
    tokens = p * batch.G * batch.T
    vocab = c.vocab_size // (1 if c.vocab_size % split.tensor else split.tensor)
    return -(-tokens // chunks.count(tokens, vocab, backend)) * vocab * 4.0


def _gathered(cfg: Config, c: DecoderConfig, split: Split, copies: int = 1) -> float:
    """Bytes of a layer's weights brought together from the devices along fsdp."""
    if split.fsdp == 1:
        return 0.0
    return copies * layer_parameters(c) * jnp.dtype(cfg.model.dtype).itemsize / split.tensor


def layer_parameters(c: DecoderConfig) -> int:
    """Numbers in the matrices of one layer."""
    attention = 2 * c.hidden_size * (c.num_heads + c.num_kv_heads) * c.head_dim
    return attention + 3 * c.hidden_size * c.intermediate_size


def _layer_bytes(
    c: DecoderConfig,
    cfg: Config,
    p: int,
    S: int,
    G: int,
    T: int,
    tensor: int,
    products: bool = False,
) -> float:
    """Bytes that one layer keeps for its backward pass, for p rows: all, or only products."""
    a = cfg.model.lora
    local = _local(c, tensor)
    setting = (a.rank, a.targets if a.rank else (), a.dropout if a.rank else 0.0)
    return p * _per_prompt(local, _Row(cfg.model.dtype, S, G, T, *setting, products))


def _local(c: DecoderConfig, tensor: int) -> DecoderConfig:
    """One device's share of a layer that is split along `tensor`."""
    if tensor == 1 or c.num_heads % tensor or c.intermediate_size % tensor:
        return c
    return dataclasses.replace(
        c,
        num_heads=c.num_heads // tensor,
        num_kv_heads=max(1, c.num_kv_heads // tensor),
        intermediate_size=c.intermediate_size // tensor,
    )


class _Row(NamedTuple):
    """A training row and how it is computed; hashable, for the cache."""

    dtype: str
    S: int
    G: int
    T: int
    rank: int
    targets: tuple[str, ...]
    dropout: float
    products: bool  # keep only those


@functools.lru_cache(maxsize=256)
def _per_prompt(c: DecoderConfig, row: _Row) -> float:
    """What grows with each prompt: the difference between two prompts and one."""
    return float(_residuals(c, 2, row) - _residuals(c, 1, row))


def _residuals(c: DecoderConfig, P: int, row: _Row) -> int:
    """Bytes of what `jax.vjp` of one layer hands to its backward pass."""
    dtype, S, G, T, rank, targets, dropout, products = row
    layer = DecoderLayer(c, jnp.dtype(dtype), dropout, G, False)
    kind = jax.tree.map(jnp.asarray, c.layer_kinds()[0])
    shape = jax.ShapeDtypeStruct
    X = S + G * T
    x = shape((P, X, c.hidden_size), jnp.dtype(dtype))
    positions, mask = shape((P, X), jnp.int32), shape((P, S), jnp.bool_)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def layout(positions: Any, mask: Any) -> Layout:
        return Layout(positions, mask, all_rotations(c, positions))

    def init(key: Any, x: Any, positions: Any, mask: Any) -> Any:
        return layer.init(key, x, layout(positions, mask), kind)

    params = jax.eval_shape(init, key, x, positions, mask)["params"]
    adapter: dict = {}
    if rank:
        stacked = {"layers": jax.tree.map(lambda p: p.update(shape=(1, *p.shape)), params)}
        settings = Lora(rank=rank, targets=targets)
        adapter = jax.eval_shape(lambda k, p: lora.init(k, p, settings), key, stacked)["layers"]
        adapter = jax.tree.map(lambda p: p.update(shape=p.shape[1:]), adapter)

    def residuals(x: Any, params: Any, adapter: Any, positions: Any, mask: Any, key: Any) -> Any:
        frozen = {"params": params, "lora": adapter} if rank else {}

        def run(x: Any, trained: Any) -> Any:
            variables = frozen | ({"lora": trained} if rank else {"params": trained})
            rngs = {"dropout": key} if dropout else None
            out: Any = layer.apply(variables, x, layout(positions, mask), kind, rngs=rngs)
            return out[0]

        if products:
            run = jax.checkpoint(run, policy=POLICIES["dots"])
        return jax.vjp(run, x, adapter if rank else params)[1]

    kept = jax.eval_shape(residuals, x, params, adapter, positions, mask, key)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
