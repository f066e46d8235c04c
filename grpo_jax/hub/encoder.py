"""Sentence encoders in the sentence-transformers layout: texts -> one vector each.

In: a folder whose modules.json chains a BERT transformer, Pooling (mean, cls or max) and any
number of Dense and Normalize modules. Out: `SentenceEncoder.embed`. A folder without modules.json
gets mean pooling and nothing more, as sentence-transformers itself does.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.hub.encoder_config import encoder_config
from grpo_jax.hub.decoder import check_vocabulary
from grpo_jax.hub.folder import find_folder, read_json
from grpo_jax.hub.names import encoder_ignored, encoder_table
from grpo_jax.hub.use import MODEL_TYPE, UniversalSentenceEncoder
from grpo_jax.hub.weights import Slot, numpy_dtype, read_params, weight_files
from grpo_jax.models.encoder import Encoder, EncoderConfig
from grpo_jax.structs import Array
from grpo_jax.text.tokenizer import load_pretrained

# Few lengths, so few compilations; the steps are fine where most sentences are.
_BUCKETS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "torch.nn.modules.linear.Identity": lambda x: x,
    "torch.nn.modules.activation.Tanh": jnp.tanh,
    "torch.nn.modules.activation.ReLU": jax.nn.relu,
    "torch.nn.modules.activation.GELU": functools.partial(jax.nn.gelu, approximate=False),
}


@dataclasses.dataclass(frozen=True)
class SentenceEncoder:
    """A frozen encoder. `embed` is all that the rest of the project uses."""

    config: EncoderConfig
    params: dict  # {"transformer": ..., "0": first Dense, ...}, on device
    model: Encoder
    pooling: str  # mean, cls or max
    head: tuple[str, ...]  # "normalize" or the activation of a Dense, in order
    dim: int  # width of the vectors
    max_length: int  # tokens; longer texts are cut, as sentence-transformers cuts them
    batch_size: int
    prompt: str  # put before every text
    lower_case: bool
    folder: Path
    tokenizer: Any

    def embed(self, texts: list[str]) -> np.ndarray:
        """Texts -> float32 [N, D] in the same order; L2-normalised if the model's folder says so.

        Texts are sorted by length and embedded batch by batch, each padded to its length bucket.
        """
        out = np.zeros((len(texts), self.dim), np.float32)
        if not texts:
            return out
        texts = [self.prompt + text for text in texts]
        texts = [text.lower() for text in texts] if self.lower_case else texts
        rows = self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        pending = []
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            ids, lengths = self._batch([rows[i] for i in chosen])
            pending.append((chosen, self._forward(self.params, ids, lengths)))
        for chosen, vectors in pending:  # everything is dispatched before the first wait
            out[chosen] = np.asarray(vectors)[: len(chosen)]
        return out

    def describe(self) -> str:
        """One line for logs and reports."""
        steps = " + ".join([f"{self.pooling} pooling", *(s.rpartition(".")[2] for s in self.head)])
        return (
            f"{self.folder.name}: BERT, {self.config.num_layers} layers x "
            f"{self.config.hidden_size}, {steps} -> {self.dim}-d, at most {self.max_length} tokens"
        )

    def _batch(self, rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Right-pad to a length bucket, and a last short batch to a power of two rows."""
        longest = max(map(len, rows))
        width = next((b for b in _BUCKETS if longest <= b <= self.max_length), self.max_length)
        count = min(self.batch_size, max(8, 1 << (len(rows) - 1).bit_length()))
        ids = np.zeros((count, width), np.int32)
        lengths = np.ones(count, np.int32)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            lengths[i] = len(row)
        return ids, lengths

    @functools.cached_property
    def _forward(self) -> Callable[..., jax.Array]:
        def forward(params: dict, ids: Array, lengths: Array) -> jax.Array:
            transformer = {"params": params["transformer"]}
            hidden = cast(jax.Array, self.model.apply(transformer, ids, lengths))
            x = pool(hidden.astype(jnp.float32), lengths, self.pooling)
            for i, step in enumerate(self.head):
                if step == "normalize":
                    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
                    x = x / jnp.maximum(norm, 1e-12)
                else:
                    dense = params[str(i)]
                    x = _ACTIVATIONS[step](x @ dense["kernel"] + dense.get("bias", 0.0))
            return x

        return jax.jit(forward)


def pool(hidden: jax.Array, lengths: Array, mode: str) -> jax.Array:
    """Token vectors [B, S, D] -> [B, D] over each row's first `lengths` tokens (mean, cls, max)."""
    if mode == "cls":
        return hidden[:, 0]
    mask = (jnp.arange(hidden.shape[1]) < lengths[:, None])[..., None]
    if mode == "max":
        return jnp.max(jnp.where(mask, hidden, -jnp.inf), axis=1)
    return jnp.sum(jnp.where(mask, hidden, 0.0), axis=1) / lengths[:, None]


def load_encoder(
    path: str | os.PathLike,
    dtype: str = "float32",
    max_length: int | None = None,
    batch_size: int = 64,
) -> SentenceEncoder | UniversalSentenceEncoder:
    """Load a sentence encoder: of the BERT family, or USE-multilingual as its asset stores it.

    Args:
      path: a sentence-transformers or plain BERT folder, `asset:NAME`, or a hub id.
      dtype: of activations, float32 or bfloat16; parameters stay float32.
      max_length: tokens a text is cut to; None: as the folder says.
      batch_size: texts at a time.

    Raises:
      FileNotFoundError: the folder or one of its files is missing.
      ValueError: anything in it that would not compute as its authors meant.
    """
    root = find_folder(path)
    if read_json(root / "config.json", {}).get("model_type") == MODEL_TYPE:
        return UniversalSentenceEncoder(root)
    chain = _modules(root)
    folder = root / chain[0][1]
    config = encoder_config(folder)
    transformer = read_params(
        weight_files(folder), encoder_table(config), "float32", encoder_ignored(), prefix="bert."
    )
    params = {"transformer": transformer}
    pooling, dim = "mean", config.hidden_size
    head: list[str] = []
    if len(chain) > 1:
        pooling = _pooling(root / chain[1][1], config.hidden_size)
    for kind, name in chain[2:]:
        if kind == "Dense":
            activation, dense, dim = _dense(root / name, dim)
            params[str(len(head))] = dense
            head.append(activation)
        else:
            head.append("normalize")
    tokenizer = load_pretrained(folder)
    check_vocabulary(folder, max(tokenizer.get_vocab().values()) + 1, config.vocab_size)
    settings = read_json(folder / "sentence_bert_config.json", {})
    return SentenceEncoder(
        config=config,
        params=jax.tree.map(jnp.asarray, params),
        model=Encoder(config, dtype=numpy_dtype(dtype)),
        pooling=pooling,
        head=tuple(head),
        dim=dim,
        max_length=_max_length(folder, max_length, settings, tokenizer, config),
        batch_size=batch_size,
        prompt=_prompt(root),
        lower_case=bool(settings.get("do_lower_case", False)),
        folder=root,
        tokenizer=tokenizer,
    )


def _modules(root: Path) -> list[tuple[str, str]]:
    """(kind, subfolder) of each module of modules.json, checked for an order we implement."""
    listed = read_json(root / "modules.json", {})
    if not listed:
        return [("Transformer", "")]
    chain = [(m["type"].rpartition(".")[2], m["path"]) for m in sorted(listed, key=_position)]
    kinds = [kind for kind, _ in chain]
    if kinds[:2] != ["Transformer", "Pooling"] or set(kinds[2:]) - {"Dense", "Normalize"}:
        raise ValueError(
            f"{root / 'modules.json'}: {kinds} is not supported; wanted Transformer, Pooling, then "
            "Dense and Normalize in any order"
        )
    return chain


def _position(module: dict) -> int:
    return module["idx"]


def _pooling(folder: Path, width: int) -> str:
    """The one pooling mode of a Pooling module, in the old form (flags) or the new (a name)."""
    file = folder / "config.json"
    config = read_json(file)
    got = config.get("word_embedding_dimension", config.get("embedding_dimension", width))
    if got != width:
        raise ValueError(f"{file}: pools vectors of width {got}, the transformer's are {width}")
    if not config.get("include_prompt", True):
        raise ValueError(f"{file}: include_prompt = false is not supported")
    if "pooling_mode" in config:
        mode = config["pooling_mode"]
        modes = [mode] if isinstance(mode, str) else list(mode)
    else:
        prefix = "pooling_mode_"
        flags = [k.removeprefix(prefix) for k, on in config.items() if k.startswith(prefix) and on]
        modes = [flag.removesuffix("_tokens").removesuffix("_token") for flag in flags] or ["mean"]
    if len(modes) != 1 or modes[0] not in ("mean", "cls", "max"):
        raise ValueError(f"{file}: pooling {modes} is not supported; wanted one of mean, cls, max")
    return modes[0]


def _dense(folder: Path, width: int) -> tuple[str, dict, int]:
    """Activation, parameters and output width of a Dense module fed with `width` numbers."""
    file = folder / "config.json"
    config = read_json(file)
    activation = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"{file}: activation {activation!r}; wanted one of {list(_ACTIVATIONS)}")
    if config.get("in_features") != width:
        raise ValueError(
            f"{file}: in_features {config.get('in_features')}, but the module before gives {width}"
        )
    places = {config.get("module_input_name"), config.get("module_output_name")}
    if config.get("use_residual") or places - {None, "sentence_embedding"}:
        raise ValueError(f"{file}: residual or token-wise Dense modules are not supported")
    out = config["out_features"]
    table = {"linear.weight": Slot(("kernel",), None, True, (out, width))}
    if config.get("bias", True):
        table["linear.bias"] = Slot(("bias",), None, False, (out,))
    return activation, read_params(weight_files(folder), table, "float32"), out


def _max_length(
    folder: Path, wanted: int | None, settings: dict, tokenizer: Any, config: EncoderConfig
) -> int:
    """The caller's limit, else the folder's; never more than there are positions."""
    if wanted is not None:
        if not 3 <= wanted <= config.max_position_embeddings:
            raise ValueError(
                f"max_length: got {wanted}; {folder} takes 3 to {config.max_position_embeddings}"
            )
        return wanted
    limit = settings.get("max_seq_length") or tokenizer.model_max_length
    return min(limit, config.max_position_embeddings)


def _prompt(root: Path) -> str:
    """The prompt that sentence-transformers would put before every text by default."""
    settings = read_json(root / "config_sentence_transformers.json", {})
    name = settings.get("default_prompt_name")
    prompts = settings.get("prompts") or {}
    if name is not None and name not in prompts:
        raise ValueError(
            f"{root / 'config_sentence_transformers.json'}: default_prompt_name {name!r} is not "
            f"among the prompts {list(prompts)}"
        )
    return "" if name is None else prompts[name]
