"""The shapes of a run's models from their config.json alone; no weights and no tokenizer."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax import config
from grpo_jax.hub.decoder_config import decoder_config
from grpo_jax.hub.encoder_config import family_config
from grpo_jax.hub.folder import find_folder, split_hub_id
from grpo_jax.hub.modules import transformer_folder
from grpo_jax.learn.optimizer import build_optimizer
from grpo_jax.learn.step import init_state
from grpo_jax.models import lora
from grpo_jax.models.decoder import Decoder, DecoderConfig
from grpo_jax.models.encoder import Encoder


@dataclasses.dataclass(frozen=True, eq=False)  # hashed as an object: what is computed is kept
class Trees:
    """Trees of shapes: whole arrays, not yet split over devices."""

    base: dict  # the model, in model.param_dtype
    frozen: dict  # the copy that stays, matrices in model.dtype
    trained: dict  # the model again, or the adapter
    opt_state: Any


def read_decoder(path: str, file: str = "") -> DecoderConfig:
    """The policy's architecture.

    Args:
      path: as model.path: a folder, asset:NAME or a hub id, of which only config.json is fetched.
      file: a config.json that stands in for it; '': none.

    Raises:
      FileNotFoundError, ValueError: it cannot be had, or the family is not implemented.
    """
    with _folder(path, file, "--model-config") as folder:
        return decoder_config(folder)


def read_encoder(path: str, file: str = "") -> Any:
    """As `read_decoder` for encoder.path: an EncoderConfig or, for embedders, a DecoderConfig."""
    with _folder(path, file, "--encoder-config") as folder:
        return family_config(transformer_folder(folder))[1]


@contextlib.contextmanager
def _folder(path: str, file: str, flag: str) -> Iterator[Path]:
    """A folder with the config.json."""
    if file:
        if not os.path.isfile(file):
            raise FileNotFoundError(f"{flag}={file}: no such file")
        with tempfile.TemporaryDirectory() as folder:
            shutil.copyfile(file, Path(folder) / "config.json")
            yield Path(folder)
        return
    name, revision = split_hub_id(path)
    if not name or Path(path).expanduser().is_dir():
        yield find_folder(path)
        return
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = Path(hf_hub_download(name, "config.json", revision=revision)).parent
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{path}: its config.json is neither in the cache nor given by the hub "
            f"({type(error).__name__}); give it as {flag}=FILE"
        ) from error
    yield found


def trees(cfg: config.Config, architecture: DecoderConfig) -> Trees:
    """Shapes and dtypes of all that a GRPO stage holds between two steps."""
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    drawn = jax.eval_shape(Decoder(architecture).init, key, ids, lengths)["params"]
    base = jax.tree.map(lambda x: x.update(dtype=jnp.dtype(cfg.model.param_dtype)), drawn)
    optimizer = build_optimizer(cfg.grpo.optimizer, 1)

    def init(params: dict, key: jax.Array) -> Any:
        trained = lora.init(key, params, cfg.model.lora) if cfg.model.lora.rank else params
        return init_state(trained, optimizer)

    state = jax.eval_shape(init, base, key)
    compute = jnp.dtype(cfg.model.dtype)

    def frozen(path: tuple, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return x.update(dtype=compute) if path[-1].key in ("kernel", "embedding") else x

    kept = jax.tree_util.tree_map_with_path(frozen, base)
    return Trees(base, kept, state.params, state.opt_state)


def encoders(cfg: config.Config, file: str = "") -> tuple[float, list[str]]:
    """Bytes of the encoder and the judges; a note for each that could not be read.

    Args:
      file: a config.json that stands in for the encoder's; '': none.
    """
    total, notes = 0.0, []
    judges = [("encoder.judge", path, "") for path in cfg.encoder.judge]
    for name, path, given in (("encoder.path", cfg.encoder.path, file), *judges):
        try:
            dtype = cfg.encoder.dtype if name == "encoder.path" else "float32"
            total += _encoder_bytes(read_encoder(path, given), dtype)
        except (OSError, ValueError) as error:
            notes.append(f"{name} is not counted: {str(error).splitlines()[0]}")
    return total, notes


def _encoder_bytes(architecture: Any, dtype: str) -> float:
    """Bytes of an encoder's parameters: kernels in its dtype, the rest float32."""
    model = Decoder if isinstance(architecture, DecoderConfig) else Encoder
    ids, lengths = jax.ShapeDtypeStruct((1, 2), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(model(architecture).init, key, ids, lengths)["params"]
    width = jnp.dtype(dtype).itemsize
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return float(sum(x.size * (width if path[-1].key == "kernel" else 4) for path, x in leaves))
