"""The tokenizer of a GGUF file -> tokenizer.json and tokenizer_config.json.

Two kinds: byte-level BPE ("gpt2", with the pre-tokenizer that the file names) and sentencepiece BPE
("llama"). Token ids, special tokens and the BOS and EOS that llama.cpp would add are kept.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grpo_jax.text.pieces import (
    BYTE,
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    Pieces,
    add_ends,
    as_control,
    build_bpe,
)
from grpo_jax.text.strict import library_errors, shown

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The published splits of Llama 3 (digits in threes) and Qwen2 (digits one by one).
_SPLITS = {
    "llama-bpe": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_REST}",
    "qwen2": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_REST}",
}
_SAME = {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}
_END_KEYS = ("eos", "eot", "eom")  # tokens that end a generation
_NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def end_ids(fields: dict[str, Any]) -> list[int]:
    """The ids that end a generation, the EOS first."""
    found = (fields.get(f"tokenizer.ggml.{key}_token_id") for key in _END_KEYS)
    return list(dict.fromkeys(i for i in found if i is not None))


def tokenizer_files(file: Path, fields: dict[str, Any], max_length: int) -> dict[str, str]:
    """The contents of tokenizer.json and tokenizer_config.json.

    Args:
      file: the .gguf file, for messages.
      fields: its metadata.
      max_length: the model's context.

    Raises:
      ValueError: a tokenizer that we cannot rebuild so that it gives the same ids.
    """
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    pre = _SAME.get(pre, pre)
    tokens = fields["tokenizer.ggml.tokens"]
    types = fields.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if len(set(tokens)) != len(tokens):
        twice = len(tokens) - len(set(tokens))
        raise ValueError(f"{file}: the vocabulary names {twice} tokens twice")
    if kind == "gpt2" and pre in ("smollm", *_SPLITS):
        tokenizer = _byte_level(file, fields, pre, tokens, types)
    elif kind == "llama":
        tokenizer = _sentencepiece(file, fields, tokens, types)
    else:
        wanted = ", ".join(map(repr, ("smollm", *_SPLITS)))
        raise ValueError(
            f"{file}: tokenizer {shown(kind)} with pre-tokenizer {shown(pre)}; only 'llama', and "
            f"'gpt2' with one of {wanted}, can be converted: take the model's original safetensors "
            "folder instead"
        )
    named = {
        name: tokens[index]
        for name, key in _NAMES.items()
        if (index := fields.get(f"tokenizer.ggml.{key}_token_id")) is not None
    }
    # What llama.cpp adds where the file does not say: BOS, except for the older byte-level kinds.
    default = kind == "llama" or pre == "llama-bpe"
    begins = fields.get("tokenizer.ggml.add_bos_token", default)
    ends = fields.get("tokenizer.ggml.add_eos_token", False)
    for key, wanted_there in (("bos_token", begins), ("eos_token", ends)):
        if wanted_there and key not in named:
            raise ValueError(f"{file}: adds a {key} to each text but does not name one")
    add_ends(
        tokenizer, named["bos_token"] if begins else None, named["eos_token"] if ends else None
    )
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,  # the tokenizer.json says all
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        **named,
    }
    if template := fields.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
    }


def _byte_level(
    file: Path, fields: dict[str, Any], pre: str, tokens: list[str], types: list[int]
) -> Any:
    """Byte-level BPE behind one of three splits of the text."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    if odd := sorted(set(types) - {NORMAL, CONTROL, USER_DEFINED, UNUSED}):
        raise ValueError(f"{file}: token types {odd} cannot be converted")
    merges = [tuple(merge.split(" ")) for merge in fields.get("tokenizer.ggml.merges", [])]
    if odd_merges := [merge for merge in merges if len(merge) != 2]:
        raise ValueError(f"{file}: merges of other than two tokens: {shown(odd_merges)}")
    vocab = {token: i for i, token in enumerate(tokens)}
    # Llama 3 takes a word that is in the vocabulary whole, whatever the merges say.
    with library_errors(f"{file}: the tokenizer cannot be built"):
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe")
    tokenizer = Tokenizer(model)
    if pre == "smollm":
        tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(False)])
    else:
        split = Split(Regex(_SPLITS[pre]), "isolated")
        tokenizer.pre_tokenizer = Sequence([split, ByteLevel(False, use_regex=False)])
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    user = [t for t, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in user])
    return tokenizer


def _sentencepiece(file: Path, fields: dict[str, Any], tokens: list[str], types: list[int]) -> Any:
    """sentencepiece BPE from pieces and scores; GGUF fills gaps in the ids with unused pieces."""
    if BYTE not in types:
        raise ValueError(f"{file}: a 'llama' tokenizer without byte pieces cannot be converted")
    if fields.get("tokenizer.ggml.precompiled_charsmap"):
        raise ValueError(f"{file}: a 'llama' tokenizer with a character map cannot be converted")
    pieces = Pieces(
        tokens,
        fields.get("tokenizer.ggml.scores", [0.0] * len(tokens)),
        types,
        fields.get("tokenizer.ggml.add_space_prefix", True),
        fields.get("tokenizer.ggml.remove_extra_whitespaces", False),
    )
    try:
        return build_bpe(as_control(pieces, fields.get("tokenizer.chat_template", "")))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
