"""sentencepiece's BPE as a `tokenizers.Tokenizer`: the same ids, without sentencepiece at run time.

In: the pieces with their scores and types, out of a .model file (Llama 2, Mistral, Gemma) or out
of a GGUF file. Every stretch of text between special tokens is encoded as sentencepiece encodes a
text of its own, dummy prefix included; that is what the models' authors and llama.cpp do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from grpo_jax.text.strict import library_errors, shown

SPACE = "\u2581"  # stands for a space within pieces
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_BPE, _UNIGRAM = 2, 1  # trainer_spec.model_type


class Pieces(NamedTuple):
    """A sentencepiece BPE vocabulary and how it treats white space."""

    pieces: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    dummy_prefix: bool = True  # a space goes before every text
    extra_spaces: bool = False  # outer spaces are removed, runs of them become one
    charsmap: bytes = b""  # the compiled Unicode normalisation; empty: none


class Model(NamedTuple):
    """A .model file: its kind and, for BPE, its pieces; special tokens by their usual names."""

    is_bpe: bool
    pieces: Pieces
    special: dict[str, str]


def read_model(file: Path) -> Model:
    """Read a sentencepiece .model file.

    Raises:
      ValueError: another format, or a kind of model that we cannot encode with exactly.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2 as schema

    proto = schema.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(file.read_bytes())
    except DecodeError:
        proto.Clear()
    if not proto.pieces:
        raise ValueError(
            f"{file}: not a sentencepiece model; if it is a tiktoken file, take the "
            "tokenizer.json that belongs to the model"
        )
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type not in (_BPE, _UNIGRAM):
        raise ValueError(f"{file}: only sentencepiece models of type BPE and unigram are supported")
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        raise ValueError(f"{file}: spaces behind a word, or not escaped, are not supported")
    pieces = Pieces(
        [piece.piece for piece in proto.pieces],
        [piece.score for piece in proto.pieces],
        [piece.type for piece in proto.pieces],
        normalizer.add_dummy_prefix,
        normalizer.remove_extra_whitespaces,
        normalizer.precompiled_charsmap,
    )
    if trainer.model_type == _BPE and UNUSED in pieces.types:
        raise ValueError(f"{file}: unused pieces are not supported; wanted a model as trained")
    places = {
        "bos_token": (trainer.bos_id, trainer.bos_piece),
        "eos_token": (trainer.eos_id, trainer.eos_piece),
        "unk_token": (trainer.unk_id, trainer.unk_piece),
        "pad_token": (trainer.pad_id, trainer.pad_piece),
    }
    special = {name: piece for name, (index, piece) in places.items() if index >= 0}
    return Model(trainer.model_type == _BPE, pieces, special)


def build_bpe(model: Pieces) -> Any:
    """The tokenizers.Tokenizer that gives sentencepiece's ids; control pieces are special tokens.

    Raises:
      ValueError: a piece that is there twice, or not exactly one unknown piece.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
    )

    vocab = {piece: i for i, piece in enumerate(model.pieces)}
    if len(vocab) != len(model.pieces):
        raise ValueError(f"the vocabulary names {len(model.pieces) - len(vocab)} pieces twice")
    by_type: dict[int, list[str]] = {kind: [] for kind in range(1, 7)}
    if odd := set(model.types) - set(by_type):
        raise ValueError(f"pieces of unknown types {shown(sorted(odd))}")
    for piece, kind in zip(model.pieces, model.types, strict=True):
        by_type[kind].append(piece)
    if len(by_type[UNKNOWN]) != 1:
        raise ValueError(f"unknown pieces: got {shown(by_type[UNKNOWN])}, wanted exactly one")
    user = sorted(by_type[USER_DEFINED], key=len, reverse=True)
    with library_errors("the vocabulary cannot be used"):
        tokenizer = Tokenizer(
            models.BPE(
                vocab,
                recover_merges(model),
                unk_token=by_type[UNKNOWN][0],
                fuse_unk=True,
                byte_fallback=bool(by_type[BYTE]),
                ignore_merges=bool(user),  # a user-defined piece is one token, and never merged
            )
        )
        steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.extra_spaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    if user:
        either = Regex("|".join(_escaped(piece) for piece in user))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(either, "isolated")
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(content=" ", left=1)] if model.dummy_prefix else []
    tokenizer.decoder = decoders.Sequence([*back, *strip])
    control = [*by_type[UNKNOWN], *by_type[CONTROL]]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    return tokenizer


def as_control(model: Pieces, template: str) -> Pieces:
    """Make control pieces of the <...> pieces that a chat template writes.

    Gemma's model file calls its turn marks user-defined, which would let a user's text hold them
    and leave them in decoded text.
    """
    types = [
        CONTROL if kind == USER_DEFINED and piece[:1] == "<" and piece in template else kind
        for piece, kind in zip(model.pieces, model.types, strict=True)
    ]
    return model._replace(types=types)


def recover_merges(model: Pieces) -> list[tuple[str, str]]:
    """The merges of sentencepiece BPE, best first.

    sentencepiece joins the neighbours whose union has the highest score, so every split of a
    normal piece into two pieces is a merge with the rank of its union.
    """
    rank = {
        piece: (-score, i)
        for i, (piece, score, kind) in enumerate(
            zip(model.pieces, model.scores, model.types, strict=True)
        )
        if kind == NORMAL
    }
    merges = []
    for piece in sorted(rank, key=rank.__getitem__):
        cuts = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        merges += [cut for cut in cuts if cut[0] in rank and cut[1] in rank]
    return merges


def _escaped(text: str) -> str:
    """A literal for the Oniguruma syntax of `tokenizers.Regex`."""
    return "".join(c if c.isalnum() or not c.isascii() else f"\\x{ord(c):02x}" for c in text)


def add_ends(tokenizer: Any, bos: str | None, eos: str | None) -> None:
    """Make the tokenizer put BOS before and EOS behind each text, where they are given.

    Raises:
      ValueError: one of them is not in the vocabulary.
    """
    from tokenizers import processors

    if bos is None and eos is None:
        return
    first, last = [bos] if bos else [], [eos] if eos else []
    for token in (*first, *last):
        if not isinstance(token, str) or tokenizer.token_to_id(token) is None:
            raise ValueError(f"{shown(token)}, put around each text, is not in the vocabulary")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *(f"{t}:1" for t in first), "$B:1", *(f"{t}:1" for t in last)],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*first, *last}],
    )


def add_listed(
    tokenizer: Any, folder: Path, added: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
    """Add what tokenizer_config.json and added_tokens.json list, at the ids that they give.

    Args:
      tokenizer: the tokenizers.Tokenizer to add to.
      folder: for messages.
      added: added_tokens.json, text -> id.
      config: tokenizer_config.json.

    Raises:
      ValueError: no ids, or others than those that the tokenizer gives.
    """
    from tokenizers import AddedToken

    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise ValueError(f"{folder}: added_tokens_decoder is {shown(decoder)}")
    listed: dict[int, Any] = {}
    for index, fields in [*((i, {"content": t}) for t, i in added.items()), *decoder.items()]:
        number = int(index) if isinstance(index, str) and index.isascii() else index
        if type(number) is not int or not isinstance(content_of(fields), str):
            raise ValueError(f"{folder}: {shown(index)} is no id of an added token {shown(fields)}")
        listed[number] = fields if isinstance(fields, dict) else {"content": fields}
    named = [content_of(value) for key, value in config.items() if key.endswith("_token")]
    for index, fields in sorted(listed.items()):
        content = fields["content"]
        flags = {k: bool(fields.get(k)) for k in ("lstrip", "rstrip", "single_word", "normalized")}
        special = bool(fields.get("special")) or content in named
        tokenizer.add_tokens([AddedToken(content, special=special, **flags)])
        if (got := tokenizer.token_to_id(content)) != index:
            raise ValueError(
                f"{folder}: added token {shown(content)} is {index} in tokenizer_config.json or "
                f"added_tokens.json, but {got} behind the sentencepiece model; wanted equal ids"
            )


def content_of(token: Any) -> str | None:
    """The text of a token, which configs give as a string or an object."""
    return token.get("content") if isinstance(token, dict) else token
