"""Causal language models: a Hugging Face folder -> Policy -> a Hugging Face folder.

In: a folder with config.json, safetensors and a tokenizer. Out: parameters that train, and a small
object for library use. What is saved loads in transformers and vLLM unchanged: it keeps the
config.json and generation_config.json of the folder that was loaded.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.config import Sampling
from grpo_jax.hub.decoder_config import decoder_config, export_json
from grpo_jax.hub.folder import atomic_folder, find_folder, read_object
from grpo_jax.hub.names import decoder_ignored, decoder_table
from grpo_jax.hub.tensors import numpy_dtype
from grpo_jax.hub.weights import Placement, Weights, open_weights, weight_files
from grpo_jax.hub.writing import unstack, write_safetensors
from grpo_jax.models.decoder import Decoder, DecoderConfig, logits
from grpo_jax.rollout.sampler import build_sampler
from grpo_jax.structs import Array, Rollout
from grpo_jax.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Policy:
    """A language model with its tokenizer. To carry trained parameters, dataclasses.replace it."""

    config: DecoderConfig
    params: dict  # nested dict of arrays, see models.decoder; of open_decoder: their shapes
    tokenizer: Tokenizer
    model: Decoder
    folder: Path  # where it was loaded from
    source: str  # the same as it was asked for: a folder, a hub id or asset:NAME
    weights: Weights  # the folder's, which can be read again
    config_json: dict[str, Any]  # what an export's config.json is made of
    generation_json: dict[str, Any]  # the folder's generation_config.json

    def logits(self, ids: Array) -> jax.Array:
        """Next-token scores of whole sequences.

        Args:
          ids: int32 [B, T], every row T tokens long.

        Returns:
          float32 [B, T, V].
        """
        ids = np.asarray(ids)
        if ids.ndim != 2 or not ids.size:
            raise ValueError(f"ids: got shape {ids.shape}, wanted [B, T] with at least one token")
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise ValueError(
                f"ids: got {ids.min()} to {ids.max()}, wanted 0 to {self.config.vocab_size - 1}"
            )
        lengths = np.full(ids.shape[0], ids.shape[1], np.int32)
        return self._forward(self._on_device, ids.astype(np.int32), lengths)

    def generate(
        self,
        prompts: list[str],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int | None = None,
        chat: bool = True,
        batch_size: int = 32,
    ) -> list[str]:
        """One completion a prompt.

        Args:
          prompts: user messages, or with chat = False the texts to continue.
          max_new_tokens: longest completion.
          temperature: 0 is greedy.
          top_p, top_k, min_p: truncations as in config.Sampling.
          seed: of the draws; None takes a fresh one and logs it.
          chat: wrap each prompt in the chat template.
          batch_size: prompts at a time.

        Raises:
          ValueError: a prompt that does not fit the context, or no chat template.
        """
        rows = [self.tokenizer.encode_prompt(prompt, chat=chat) for prompt in prompts]
        room = self.config.max_position_embeddings - max_new_tokens
        for i, row in enumerate(rows):
            if not 0 < len(row) <= room:
                raise ValueError(
                    f"prompts[{i}]: {len(row)} tokens; wanted 1 to {room}, so that "
                    f"{max_new_tokens} new ones fit the context"
                )
        if seed is None:
            seed = secrets.randbits(31)
            if temperature > 0:
                log.info("generate: seed %d", seed)
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        sample = self._sampler(sampling, max_new_tokens)
        key = jax.random.key(seed)
        texts: list[str] = []
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            ids, lengths = _pad(batch, batch_size)
            rollout = sample(
                {"params": self._on_device},
                ids,
                lengths,
                jax.random.fold_in(key, start),
                num_generations=1,
            )
            tokens, mask = np.asarray(rollout.ids)[:, 0], np.asarray(rollout.mask)[:, 0]
            completions = [tokens[i][mask[i]].tolist() for i in range(len(batch))]
            texts += self.tokenizer.decode(completions)
        return texts

    @functools.cached_property
    def _on_device(self) -> dict:
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(self.params)):
            raise ValueError(f"{self.source}: opened without its weights; use load_decoder")
        return jax.tree.map(jnp.asarray, self.params)

    @functools.cached_property
    def _forward(self) -> Callable[..., jax.Array]:
        def forward(params: dict, ids: Array, lengths: Array) -> jax.Array:
            hidden = cast(jax.Array, self.model.apply({"params": params}, ids, lengths))
            return logits(self.config, params, hidden)

        return jax.jit(forward)

    @functools.cached_property
    def _samplers(self) -> dict[tuple, Callable[..., Rollout]]:
        return {}

    def _sampler(self, sampling: Sampling, max_new_tokens: int) -> Callable[..., Rollout]:
        """One compiled sampler a setting, so that the second call with it is warm."""
        setting = (*dataclasses.astuple(sampling), max_new_tokens)
        if setting not in self._samplers:
            self._samplers[setting] = build_sampler(
                self.model, sampling, max_new_tokens, self.tokenizer.eos_ids
            )
        return self._samplers[setting]


def _pad(rows: list[list[int]], batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-pad to few distinct shapes: rows to a power of two, columns to a multiple of 32."""
    count = min(batch_size, 1 << (len(rows) - 1).bit_length())
    rows = rows + rows[:1] * (count - len(rows))
    width = -(-max(map(len, rows)) // 32) * 32
    ids = np.zeros((count, width), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return ids, np.asarray([len(row) for row in rows], np.int32)


def open_decoder(
    path: str | os.PathLike, dtype: str = "float32", param_dtype: str = "float32"
) -> Policy:
    """`load_decoder` without reading the weights: everything is checked, `params` holds shapes.

    `policy.weights.read(placement)` reads the parameters, anew at each call.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype {dtype!r}: activations are float32 or bfloat16")
    folder = find_folder(path)
    config = decoder_config(folder)
    files = weight_files(folder)
    tokenizer = Tokenizer.load(folder)
    check_vocabulary(folder, tokenizer.vocab_size, config.vocab_size)
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}
    composite = "text_config" in read_object(folder / "config.json")
    weights = open_weights(
        files,
        decoder_table(config),
        param_dtype,
        decoder_ignored(config),
        aliases=tied,
        rename=_language_model if composite else None,
    )
    if weights.unused:
        log.info("%s: %d tensors are not of the language model", folder, len(weights.unused))
    return Policy(
        config=config,
        params=weights.shapes(),
        tokenizer=tokenizer,
        model=Decoder(config, dtype=numpy_dtype(dtype)),
        folder=folder,
        source=os.fspath(path),
        weights=weights,
        config_json=export_json(folder),
        generation_json=read_object(folder / "generation_config.json", {}),
    )


def load_decoder(
    path: str | os.PathLike,
    dtype: str = "float32",
    param_dtype: str = "float32",
    placement: Placement | None = None,
) -> Policy:
    """Load a causal language model of one of hub.decoder_config's families.

    Args:
      path: a Hugging Face folder, `asset:NAME`, or a hub id, NAME/NAME or NAME/NAME@REVISION.
      dtype: of activations and matrix products, float32 or bfloat16.
      param_dtype: of the parameters, float32, bfloat16 or float16.
      placement: (path, shape) of a parameter -> its jax sharding; each is read straight to there.

    Returns:
      A Policy with parameters as jax arrays, or, without placement, as NumPy arrays on the host.

    Raises:
      FileNotFoundError: the folder or one of its files is missing.
      ValueError: anything in it that would not compute as its authors meant, all listed at once.
    """
    policy = open_decoder(path, dtype, param_dtype)
    return dataclasses.replace(policy, params=policy.weights.read(placement))


def _language_model(name: str) -> str | None:
    """A tensor's name in a model with images, as the language model alone has it; None: not its."""
    for outer, inner in (
        ("language_model.lm_head.", "lm_head."),
        ("language_model.model.", "model."),
        ("model.language_model.", "model."),
    ):
        if name.startswith(outer):
            return inner + name.removeprefix(outer)
    parts = name.removeprefix("model.").split(".")
    return None if parts[0] in ("vision_tower", "multi_modal_projector") else name


def check_vocabulary(folder: Path, tokenizer_size: int, embedding_size: int) -> None:
    """Raises ValueError where the tokenizer knows ids that the embedding has no row for."""
    if tokenizer_size > embedding_size:
        raise ValueError(
            f"{folder}: the tokenizer has ids up to {tokenizer_size - 1}, the embedding only "
            f"{embedding_size} rows; take the tokenizer that belongs to the model"
        )


def save_decoder(
    policy: Policy, folder: str | os.PathLike, card: str = "", dtype: str | None = None
) -> None:
    """Write a Hugging Face folder that appears complete or not at all.

    Args:
      policy: parameters must be whole on this process (LoRA merged, shards gathered).
      folder: where to; a model folder that is there is replaced.
      card: the README.md.
      dtype: of the weights, float32, bfloat16 or float16; None keeps the parameters' own.

    Raises:
      ValueError: parameters that do not fit the config, a number that float16 cannot hold, or a
        folder that is not a model's.
      OSError: the disk is full or not writable; what was there before still is.
    """
    tensors = unstack(policy.params, decoder_table(policy.config))
    kinds = {str(tensor.dtype) for tensor in tensors.values()} if dtype is None else {dtype}
    config = {k: v for k, v in policy.config_json.items() if k != "torch_dtype"}
    config |= policy.tokenizer.special_ids()
    config["dtype"] = "float32" if len(kinds) > 1 else kinds.pop()
    with atomic_folder(Path(folder)) as out:
        _write_json(out / "config.json", config)
        save_companions(policy, out, card or _card(policy, Path(folder)))
        write_safetensors(out, tensors, dtype)


def save_companions(policy: Policy, out: Path, card: str) -> None:
    """Write what goes with weights and adapters alike: tokenizer, generation settings, README."""
    generation = policy.generation_json | policy.tokenizer.special_ids()
    _write_json(out / "generation_config.json", generation)
    policy.tokenizer.save(out)
    (out / "README.md").write_text(card, encoding="utf-8")


def _card(policy: Policy, folder: Path) -> str:
    return f"# {folder.name}\n\nTrained with grpo_jax from {policy.folder.name}.\n"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
