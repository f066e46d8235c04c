"""Sentence encoders in the sentence-transformers layout: texts or token ids -> one vector each.

In: a folder whose modules.json chains a transformer (the BERT family, or a decoder as in
Qwen3-Embedding), Pooling and any number of Dense and Normalize modules; or a plain model folder.
Out: `SentenceEncoder.embed`, and `embed_ids` for a policy that has the same tokenizer.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.hub.decoder import check_vocabulary
from grpo_jax.hub.encoder_config import ENCODER_TYPES, family_config
from grpo_jax.hub.folder import find_folder, read_object
from grpo_jax.hub.modules import (
    ACTIVATIONS,
    Head,
    read_head,
    read_prompt,
    read_settings,
    transformer_folder,
)
from grpo_jax.hub.names import current_norms, encoder_ignored, encoder_prefix, encoder_table
from grpo_jax.hub.pooling import pool
from grpo_jax.hub.use import MODEL_TYPE, UniversalSentenceEncoder
from grpo_jax.hub.weights import numpy_dtype, read_params, weight_files
from grpo_jax.models.decoder import Decoder, DecoderConfig
from grpo_jax.models.encoder import Encoder, EncoderConfig
from grpo_jax.structs import Array
from grpo_jax.text.measures import MAX_CHARS, sanitise
from grpo_jax.text.strict import library_errors
from grpo_jax.text.tokenizer import load_pretrained

# Few lengths, so few compilations, and less than a quarter of padding.
_BUCKETS = tuple(base << k for k in range(15) for base in (16, 20, 24, 28))
_LONG = 512  # tokens; batches of longer texts have fewer rows, for attention grows with the square


@dataclasses.dataclass(frozen=True)
class SentenceEncoder:
    """A frozen encoder. Build it with `load_encoder`."""

    kind: str  # model_type of the transformer
    config: EncoderConfig | DecoderConfig
    params: dict  # {"transformer": ..., "0": first step, if it is a Dense, ...}, on device
    model: Encoder | Decoder
    head: Head
    max_length: int  # tokens; longer texts are cut, as sentence-transformers cuts them
    batch_size: int
    prompt: str  # put before every text
    folder: Path
    tokenizer: Any  # transformers' tokenizer

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return self.head.dim

    def embed(self, texts: list[str]) -> np.ndarray:
        """Texts -> float32 [N, D] in the same order; L2-normalised if the model's folder says so.

        Texts are sorted by length and embedded batch by batch, each padded to its length bucket.
        """
        return self.start(texts)()

    def start(self, texts: list[str]) -> Callable[[], np.ndarray]:
        """Starts `embed` on the device; the function returned waits for its result."""
        rows = self._tokenize(texts)
        pending = []
        for chosen, count, width in self._batches(np.array([len(row) for row in rows], int)):
            ids = np.zeros((count, width), np.int32)
            lengths = np.zeros(count, np.int32)
            for i, place in enumerate(chosen):
                ids[i, : len(rows[place])] = rows[place]
                lengths[i] = len(rows[place])
            pending.append((chosen, self._forward(self.params, ids, lengths)))
        return lambda: self._fetch(pending, len(texts))

    def shares_tokenizer(self, folder: Path) -> bool:
        """Whether a policy's token ids mean the same to this encoder, so that it can read them.

        True where the tokenizer of `folder` splits and merges as this one does and no added token
        stands for another one's id. What the two put around a text may differ, and the policy may
        lack some of the added tokens; `same_tokens` settles the single text.
        """
        theirs, ours = _rules(load_pretrained(folder)), _rules(self.tokenizer)
        added = [
            {t["id"]: t["content"] for t in rules.pop("added_tokens")} for rules in (theirs, ours)
        ]
        return theirs == ours and all(added[1].get(i, text) == text for i, text in added[0].items())

    def embed_ids(self, ids: Array, lengths: np.ndarray) -> Callable[[], np.ndarray]:
        """Starts embedding token ids on the device; the prompt and special tokens are put around.

        Equal rows are embedded once. A row that does not fit max_length has a meaningless vector.

        Args:
          ids: int32 [N, T], of a tokenizer that `shares_tokenizer`; best on the device already.
          lengths: int32 [N], how many tokens of each row are the text: no end-of-sequence.

        Returns:
          A function that waits for the vectors: float32 [N, D].
        """
        host = np.where(np.arange(ids.shape[1]) < lengths[:, None], np.asarray(ids), -1)
        _, first, place = np.unique(host, axis=0, return_index=True, return_inverse=True)
        ids = jax.device_put(ids, next(iter(jax.tree.leaves(self.params)[0].devices())))
        around = sum(map(len, self._affixes))
        pending = []
        for chosen, count, width in self._batches(
            np.minimum(lengths[first] + around, self.max_length)
        ):
            rows = np.resize(first[chosen], count).astype(np.int32)
            counts = np.asarray(lengths)[rows].astype(np.int32)
            pending.append((chosen, self._forward_ids(self.params, ids, rows, counts, width=width)))
        return lambda: self._fetch(pending, len(first))[place.reshape(-1)]

    def same_tokens(self, texts: list[str], ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """bool [N]: whether embed(texts) would see the very tokens that embed_ids sees.

        A model may spell a word with other tokens than its tokenizer would, and white space at the
        ends or special tokens do not survive decoding. Such rows must be embedded as text.

        Args:
          texts: N texts.
          ids, lengths: as in `embed_ids`.
        """
        before, after = self._affixes
        rows = zip(self._tokenize(texts), ids, lengths, strict=True)
        return np.array(
            [bool(row) and row == before + part[:n].tolist() + after for row, part, n in rows], bool
        )

    def describe(self) -> str:
        """One line for logs and reports."""
        pooling = " and ".join(self.head.pooling) + " pooling"
        steps = " + ".join([pooling, *(step.rpartition(".")[2] for step in self.head.steps)])
        family = ENCODER_TYPES.get(self.kind, f"{self.kind} decoder")
        prompt = f", prompt {self.prompt!r}" if self.prompt else ""
        return (
            f"{self.folder.name}: {family}, {self.config.num_layers} layers x "
            f"{self.config.hidden_size}, {steps} -> {self.dim}-d, at most {self.max_length} tokens"
            f"{prompt}"
        )

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        most = max(MAX_CHARS, 32 * self.max_length)  # what is behind would be cut anyway
        texts = [self.prompt + sanitise(text, most) for text in texts]
        return self._ids(texts, truncation=True, max_length=self.max_length)

    def _ids(self, text: str | list[str], **options: Any) -> Any:
        with library_errors(f"{self.folder}: the tokenizer cannot encode"):
            return self.tokenizer(text, **options)["input_ids"]

    def _batches(self, lengths: np.ndarray) -> Iterator[tuple[np.ndarray, int, int]]:
        """Rows by falling length, in (places, number of rows to compute, width) of each batch.

        Widths are buckets, and a batch is full or an eighth of that, so few shapes occur.
        """
        order = np.argsort(-lengths, kind="stable")
        while len(order):
            longest = lengths[order[0]]
            width = min(next(b for b in _BUCKETS if longest <= b), self.max_length)
            most = max(1, self.batch_size * _LONG**2 // max(width, _LONG) ** 2)
            few = min(most, max(8, most // 8))
            rows = most if len(order) > most - few else few
            chosen, order = order[:rows], order[rows:]
            yield chosen, rows, width

    def _fetch(self, pending: Sequence[tuple[np.ndarray, Array]], count: int) -> np.ndarray:
        """Waits for the dispatched batches, (places, vectors) each: float32 [count, D]."""
        out = np.zeros((count, self.dim), np.float32)
        for chosen, vectors in pending:
            out[chosen] = np.asarray(vectors)[: len(chosen)]
        return out

    @functools.cached_property
    def _affixes(self) -> tuple[list[int], list[int]]:
        """The ids before and after a text's own: special tokens, and the prompt before it."""
        ids, own = self._ids("a"), self._ids("a", add_special_tokens=False)
        start = next(i for i in range(len(ids)) if ids[i : i + len(own)] == own)
        prompt = self._ids(self.prompt, add_special_tokens=False)
        return ids[:start] + prompt, ids[start + len(own) :]

    @functools.cached_property
    def _skip(self) -> int:
        """Tokens at the start that are not pooled, counted as sentence-transformers does."""
        if self.head.include_prompt or not self.prompt:
            return 0
        ids = self._tokenize([""])[0]
        return len(ids) - (bool(ids) and ids[-1] in self.tokenizer.all_special_ids)

    def _vectors(self, params: dict, ids: Array, lengths: Array) -> jax.Array:
        """int32 [B, S] padded on the right, int32 [B] -> float32 [B, D]."""
        transformer = {"params": params["transformer"]}
        hidden = self.model.apply(transformer, ids, jnp.maximum(lengths, 1))
        x = pool(cast(jax.Array, hidden), lengths, self.head.pooling, self._skip)
        for i, step in enumerate(self.head.steps):
            if step == "normalize":
                x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
            else:
                dense = params[str(i)]
                x = ACTIVATIONS[step](x @ dense["kernel"] + dense.get("bias", 0.0))
        return x

    @functools.cached_property
    def _forward(self) -> Callable[..., jax.Array]:
        return jax.jit(self._vectors)

    @functools.cached_property
    def _forward_ids(self) -> Callable[..., jax.Array]:
        before, after = (np.asarray(part, np.int32) for part in self._affixes)

        def forward(
            params: dict, ids: jax.Array, rows: Array, counts: Array, width: int
        ) -> jax.Array:
            """Rows of ids [N, T] as before + ids[row, :count] + after, cut at `width`."""
            wide = (0, max(0, width - ids.shape[1]))
            own = jnp.pad(ids[rows], ((0, 0), wide))[:, : width - len(before)]
            heads = jnp.broadcast_to(before, (len(rows), len(before)))
            tokens = jnp.concatenate([heads, own], axis=1)
            ends = len(before) + counts[:, None]
            for i, token in enumerate(after):
                tokens = jnp.where(jnp.arange(width) == ends + i, token, tokens)
            return self._vectors(params, tokens, jnp.minimum(ends[:, 0] + len(after), width))

        return jax.jit(forward, static_argnames="width")


def _rules(tokenizer: Any) -> dict[str, Any]:
    """What decides a text's tokens, apart from those put around it."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    return {name: rules[name] for name in ("model", "normalizer", "pre_tokenizer", "added_tokens")}


def load_encoder(
    path: str | os.PathLike,
    dtype: str = "float32",
    max_length: int | None = None,
    batch_size: int = 64,
    pooling: str | None = None,
    normalize: bool | None = None,
    prompt_name: str | None = None,
    prompt: str | None = None,
) -> SentenceEncoder | UniversalSentenceEncoder:
    """Load a sentence encoder, or USE-multilingual as its asset stores it.

    Args:
      path: a sentence-transformers or plain model folder, `asset:NAME`, or a hub id. Families:
        BERT, RoBERTa, XLM-RoBERTa, MPNet, and decoders such as Qwen3-Embedding.
      dtype: of activations and matrices, float32 or bfloat16; embeddings and norms stay float32.
      max_length: tokens a text is cut to; None: as the folder says.
      batch_size: texts at a time.
      pooling, normalize: for folders without modules.json, see hub.modules.read_head.
      prompt_name, prompt: what goes before every text, see hub.modules.read_prompt.

    Raises:
      FileNotFoundError: the folder or one of its files is missing.
      ValueError: anything in it that would not compute as its authors meant.
    """
    root = find_folder(path)
    if read_object(root / "config.json", {}).get("model_type") == MODEL_TYPE:
        if any(value is not None for value in (pooling, normalize, prompt_name, prompt)):
            raise ValueError(f"{root}: {MODEL_TYPE} takes no pooling, normalize or prompt")
        return UniversalSentenceEncoder(root)
    folder = transformer_folder(root)
    kind, config = family_config(folder)
    compute = numpy_dtype(dtype)
    transformer = read_params(
        weight_files(folder),
        encoder_table(kind, config),
        "float32",
        encoder_ignored(kind, config),
        prefix=encoder_prefix(kind),
        rename=current_norms,
    )
    head = read_head(root, config.hidden_size, pooling, normalize)
    settings = read_settings(folder)
    tokenizer = load_pretrained(folder)
    if settings.get("do_lower_case"):
        _lower_case(tokenizer)
    check_vocabulary(folder, max(tokenizer.get_vocab().values()) + 1, config.vocab_size)
    model: Encoder | Decoder
    if isinstance(config, DecoderConfig):
        model, most = Decoder(config, dtype=compute), config.max_position_embeddings
    else:
        model, most = Encoder(config, dtype=compute), config.max_length
    encoder = SentenceEncoder(
        kind=kind,
        config=config,
        params=_on_device(transformer, compute) | jax.tree.map(jnp.asarray, head.params),
        model=model,
        head=head,
        max_length=most,
        batch_size=batch_size,
        prompt=read_prompt(root, prompt_name, prompt),
        folder=root,
        tokenizer=tokenizer,
    )
    return dataclasses.replace(encoder, max_length=_max_length(encoder, max_length, settings))


def _on_device(transformer: dict, compute: np.dtype) -> dict:
    """Matrices in the compute dtype, to which they would be cast anyway; the rest as it is."""

    def put(path: tuple, x: np.ndarray) -> jax.Array:
        return jnp.asarray(x, compute if path[-1].key == "kernel" else x.dtype)

    return {"transformer": jax.tree_util.tree_map_with_path(put, transformer)}


def _lower_case(tokenizer: Any) -> None:
    """Lower-case before anything else, unless the tokenizer does so itself."""
    from tokenizers import normalizers

    backend = tokenizer.backend_tokenizer
    own = backend.normalizer
    sequence = isinstance(own, normalizers.Sequence)
    parts = list(cast(Any, own)) if sequence else [own] if own else []
    if not any(isinstance(part, normalizers.Lowercase) for part in parts):
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *parts])


def _max_length(encoder: SentenceEncoder, wanted: int | None, settings: dict) -> int:
    """The caller's limit, else the folder's; never more than there are positions."""
    most = encoder.max_length
    least = sum(map(len, encoder._affixes)) + 1
    limit = wanted
    if limit is None:
        limit = settings.get("max_seq_length") or encoder.tokenizer.model_max_length
        limit = min(limit, most)
    if not least <= limit <= most:
        prompt = f" with its prompt {encoder.prompt!r}" if encoder.prompt else ""
        raise ValueError(
            f"max_length: got {limit}; {encoder.folder}{prompt} takes {least} to {most}"
        )
    return limit
