"""What a model makes of a language: a folder and sample text in, a page of numbers out.

`describe` says what the model is and how its tokenizer cuts the text (unknown tokens, tokens a
character, ...); for an encoder also whether its vectors tell matched pairs from mismatched ones,
across the two languages and within the target language. The verdicts use the thresholds below, so
that an encoder that cannot see a language is found out before training with it.
"""

from __future__ import annotations

import dataclasses
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.hub.decoder_config import decoder_config
from grpo_jax.hub.encoder import load_encoder
from grpo_jax.hub.folder import find_folder, read_json, read_object
from grpo_jax.hub.separation import Separation, lines, separation, thin, unit
from grpo_jax.hub.weights import weight_files
from grpo_jax.text.scripts import units
from grpo_jax.text.tokenizer import Tokenizer

# Thresholds of the verdicts.
BLIND = 0.2  # this share of characters in no known token: the model cannot see the text
DIM = 0.02  # this share, or this share of marks taken off: it sees it in part
COSTLY = 1.0  # tokens a character; ordinary subwords need 0.2 to 0.5
CUT = 0.1  # share of texts longer than the encoder reads
INEXACT = 0.01  # share of texts that decoding does not give back
CHANCE = 0.5  # AUC; an interval that reaches down to it
WEAK, FAIR = 0.8, 0.95  # AUC below which pairs are told apart badly, or not always
SAME_LANGUAGE = 0.9  # AUC of target texts and their thinned copies; less: it does not read them

MIN_PAIRS = 20  # fewer say nothing about retrieval


@dataclasses.dataclass(frozen=True)
class Tokens:
    """How a tokenizer cuts one side's texts; shares are in [0, 1]."""

    texts: int
    unk_tokens: float  # share of tokens that are unknown
    unk_texts: float  # share of texts with one
    unseen: float  # share of characters, spaces aside, in an unknown token or in no token at all
    dropped: float  # share of characters that are accents or vowel signs and are taken off
    alike: float  # share of texts whose tokens are those of another, different text
    fragments: float  # share of tokens that are bytes or pieces of a character
    tokens_per_char: float
    tokens_per_unit: float  # a word, a Tibetan syllable or a Chinese character, see text.scripts
    cut: float | None  # share of texts longer than the encoder's max_length; None: a decoder
    round_trip: (
        float | None
    )  # share of texts that decode(encode(text)) gives back; None: an encoder


@dataclasses.dataclass(frozen=True)
class Description:
    """What `describe` found. str() makes the page that the command prints."""

    name: str
    kind: str  # decoder or encoder
    summary: str  # family, size, vocabulary, limits
    tokens: dict[str, Tokens]  # by side: "source", "target"; {} where the encoder hides its tokens
    across: Separation | None  # source against target
    within: Separation | None  # target against itself with every third unit left out
    verdicts: tuple[str, ...]

    def __str__(self) -> str:
        page = [f"{self.name} ({self.kind})", f"  {self.summary}"]
        if self.tokens:
            rows = [(field, [getattr(t, field) for t in self.tokens.values()]) for field in _LABELS]
            page += ["", f"{'tokens':36}" + "".join(f"{side:>10}" for side in self.tokens)]
            for field, values in rows:
                if values[0] is not None:
                    shown = "".join(f"{_LABELS[field][1].format(v):>10}" for v in values)
                    page.append(f"  {_LABELS[field][0]:34}{shown}")
        for title, found in (
            ("source against target", self.across),
            ("target against itself, every third unit left out", self.within),
        ):
            if found is not None:
                page += ["", f"{title} ({found.pairs} pairs, all mismatched pairs)"]
                page += [f"  {line}" for line in lines(found)]
        return "\n".join([*page, "", *(f"- {verdict}" for verdict in self.verdicts)])


_LABELS = {
    "texts": ("texts", "{}"),
    "unk_tokens": ("unknown tokens", "{:.1%}"),
    "unk_texts": ("texts with an unknown token", "{:.1%}"),
    "unseen": ("characters in no known token", "{:.1%}"),
    "dropped": ("characters taken off (marks)", "{:.1%}"),
    "alike": ("texts with another's tokens", "{:.1%}"),
    "fragments": ("tokens below a character", "{:.1%}"),
    "tokens_per_char": ("tokens a character", "{:.2f}"),
    "tokens_per_unit": ("tokens a word or syllable", "{:.2f}"),
    "cut": ("texts cut at max_length", "{:.1%}"),
    "round_trip": ("texts that decode to themselves", "{:.1%}"),
}


def describe(path: str | os.PathLike, samples: Sequence[str | tuple[str, str]] = ()) -> Description:
    """Describe a decoder or an encoder by what it makes of sample text.

    Args:
      path: a Hugging Face folder, `asset:NAME`, or a hub id. It is taken for an encoder if it has
        modules.json or is no ...ForCausalLM; a decoder's weights are not read.
      samples: texts of the target language, or (source, target) pairs. Empty: only the summary.
        Pairs whose source or target came before, and empty texts, are left out.

    Returns:
      A Description; `print` it. Verdicts follow this module's constants: BLIND, DIM, COSTLY, CUT,
      INEXACT, CHANCE, WEAK, FAIR and SAME_LANGUAGE.

    Raises:
      FileNotFoundError, ValueError: the model cannot be loaded here, or samples of mixed kinds.
    """
    sides = _sides(samples)
    root = find_folder(path)
    architectures = read_object(root / "config.json", {}).get("architectures")
    listed = architectures if isinstance(architectures, list) else []
    causal = any("CausalLM" in str(name) for name in listed)
    if causal and not (root / "modules.json").is_file():
        return _decoder(root, sides)
    return _encoder(root, sides)


def _sides(samples: Sequence[str | tuple[str, str]]) -> dict[str, list[str]]:
    """{"source": [...], "target": [...]}, or only "target", without repetitions."""
    kinds = {isinstance(sample, str) for sample in samples}
    if len(kinds) > 1:
        raise ValueError("samples: got texts and pairs mixed, wanted one kind")
    if not samples:
        return {}
    if kinds == {True}:
        return {"target": list(dict.fromkeys(str(text) for text in samples if str(text).strip()))}
    kept: list[tuple[str, str]] = []
    seen: set[tuple[int, str]] = set()
    for source, target in (sample for sample in samples if not isinstance(sample, str)):
        if source.strip() and target.strip() and not {(0, source), (1, target)} & seen:
            kept.append((source, target))
            seen |= {(0, source), (1, target)}
    return {"source": [source for source, _ in kept], "target": [target for _, target in kept]}


def _decoder(root: Path, sides: dict[str, list[str]]) -> Description:
    config = decoder_config(root)
    tokenizer = Tokenizer.load(root)
    tokens = {side: _tokens(tokenizer.pretrained, texts) for side, texts in sides.items() if texts}
    summary = (
        f"{read_object(root / 'config.json')['model_type']}, {config.num_layers} layers x "
        f"{config.hidden_size}, {_parameters(root)}, vocabulary {config.vocab_size}, context "
        f"{config.max_position_embeddings}, chat template: "
        f"{'yes' if tokenizer.has_chat_template else 'no'}"
    )
    verdicts = _token_verdicts(tokens) or ["the tokenizer can write this text"] * bool(tokens)
    return Description(root.name, "decoder", summary, tokens, None, None, tuple(verdicts))


def _encoder(root: Path, sides: dict[str, list[str]]) -> Description:
    encoder: Any = load_encoder(root)
    config = getattr(encoder, "config", None)
    summary = f"{encoder.describe()}; {_parameters(root)}"
    if config is not None:
        summary += f", vocabulary {config.vocab_size}"
    tokenizer = getattr(encoder, "tokenizer", None)
    tokens = {}
    if tokenizer is not None:
        limit, prompt = encoder.max_length, getattr(encoder, "prompt", "")
        tokens = {
            side: _tokens(tokenizer, texts, limit, prompt) for side, texts in sides.items() if texts
        }
    verdicts = _token_verdicts(tokens)
    across = within = None
    targets = sides.get("target", [])
    if len(targets) >= MIN_PAIRS:
        right = unit(encoder.embed(targets))
        within = separation(right, unit(encoder.embed([thin(text) for text in targets])))
        if "source" in sides:
            across = separation(unit(encoder.embed(sides["source"])), right)
        verdicts += _separation_verdicts(across, within)
    elif sides:
        verdicts.append(f"{len(targets)} different texts: too few to compare, give {MIN_PAIRS}")
    return Description(root.name, "encoder", summary, tokens, across, within, tuple(verdicts))


def _parameters(root: Path) -> str:
    """The number of parameters stored, Dense modules included."""
    from safetensors import safe_open

    modules = read_json(root / "modules.json", {}) or [{"path": ""}]
    total = 0
    for folder in dict.fromkeys(root / module["path"] for module in modules):
        if not (folder == root or any(folder.glob("*.safetensors"))):
            continue  # pooling and normalising have no weights
        for file in weight_files(folder):
            with safe_open(file, framework="np") as tensors:
                shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
            total += sum(int(np.prod(shape)) for shape in shapes)
    return f"{total / 1e6:.1f} M parameters"


def _tokens(tokenizer: Any, texts: list[str], limit: int | None = None, prompt: str = "") -> Tokens:
    """Statistics of the tokens; `limit` is an encoder's, specials and prompt included."""
    encoded = tokenizer(
        texts, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
    )
    rows, spans = encoded["input_ids"], encoded["offset_mapping"]
    counts = Counter(token for row in rows for token in row)
    total = max(1, sum(counts.values()))
    unknown = tokenizer.unk_token_id
    alike = Counter(tuple(row) for row in rows)
    fragments = sum(n for token, n in counts.items() if _below_character(tokenizer, token))
    cut = round_trip = None
    if limit is not None:
        whole = tokenizer([prompt + text for text in texts])["input_ids"]
        cut = sum(len(row) > limit for row in whole) / len(texts)
    else:
        back = (tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in rows)
        round_trip = sum(a == b for a, b in zip(texts, back, strict=True)) / len(texts)
    return Tokens(
        texts=len(texts),
        unk_tokens=0.0 if unknown is None else counts[unknown] / total,
        unk_texts=0.0 if unknown is None else sum(unknown in row for row in rows) / len(rows),
        unseen=_unseen(texts, rows, spans, unknown),
        dropped=_dropped(tokenizer, texts),
        alike=sum(n for n in alike.values() if n > 1) / len(rows),
        fragments=fragments / total,
        tokens_per_char=total / sum(map(len, texts)),
        tokens_per_unit=total / max(1, sum(len(units(text)) for text in texts)),
        cut=cut,
        round_trip=round_trip,
    )


def _unseen(
    texts: list[str], rows: list[list[int]], spans: list[list[tuple[int, int]]], unknown: int | None
) -> float:
    """The share of characters that no known token covers.

    One unknown token may stand for a whole word, which the share of unknown tokens does not show.
    """
    missed = total = 0
    for text, row, places in zip(texts, rows, spans, strict=True):
        covered = {
            i
            for token, (a, b) in zip(row, places, strict=True)
            if token != unknown
            for i in range(a, b)
        }
        kept = [i for i, char in enumerate(text) if not char.isspace()]
        total += len(kept)
        missed += sum(i not in covered for i in kept)
    return missed / max(1, total)


def _dropped(tokenizer: Any, texts: list[str]) -> float:
    """The share of characters, spaces aside, that are combining marks and lost in normalising.

    BERT's uncased models do this to accents, and to the vowel signs of Tibetan and Indic scripts.
    """
    normalizer = tokenizer.backend_tokenizer.normalizer
    if normalizer is None:
        return 0.0

    def marks(text: str) -> int:
        return sum(unicodedata.category(char) == "Mn" for char in text)

    lost = total = 0
    for text in texts:
        whole = unicodedata.normalize("NFD", text)
        left = unicodedata.normalize("NFD", normalizer.normalize_str(text))
        total += sum(not char.isspace() for char in whole)
        lost += max(0, marks(whole) - marks(left))
    return lost / max(1, total)


def _below_character(tokenizer: Any, token: int) -> bool:
    """Whether a token is a byte fallback, or a byte-level piece that is no whole character."""
    name = tokenizer.convert_ids_to_tokens(token)
    return bool(re.fullmatch(r"<0x[0-9A-F]{2}>", name)) or "\ufffd" in tokenizer.decode([token])


def _token_verdicts(tokens: dict[str, Tokens]) -> list[str]:
    """What is wrong with the tokens of each side, in words; [] if nothing is."""
    verdicts = []
    for side, found in tokens.items():
        if found.unseen >= DIM:
            sight = "cannot see this text" if found.unseen >= BLIND else "sees this text in part"
            verdicts.append(
                f"{side}: {sight}: {found.unseen:.0%} of its characters are in no known "
                f"token, {found.unk_tokens:.0%} of its tokens are <unk>"
            )
        if found.dropped >= DIM:
            verdicts.append(
                f"{side}: {found.dropped:.0%} of its characters are accents or vowel signs that "
                "are taken off"
            )
        if found.tokens_per_char >= COSTLY:
            verdicts.append(
                f"{side}: costly: {found.tokens_per_char:.2f} tokens a character, "
                f"{found.fragments:.0%} of them below a character"
            )
        if found.cut is not None and found.cut >= CUT:
            verdicts.append(f"{side}: {found.cut:.0%} of the texts are cut; raise max_length")
        if found.round_trip is not None and 1 - found.round_trip >= INEXACT:
            verdicts.append(f"{side}: {1 - found.round_trip:.0%} of the texts change when decoded")
    return verdicts


def _separation_verdicts(across: Separation | None, within: Separation) -> list[str]:
    verdicts = []
    for found, what in ((across, "source against target"), (within, "the target language alone")):
        if found is None:
            continue
        low, high = found.auc_interval
        shown = f"AUC {found.auc:.2f} [{low:.2f}, {high:.2f}]"
        if low <= CHANCE:
            verdicts.append(f"{what}: chance: {shown}")
        elif found is within and found.auc < SAME_LANGUAGE:
            verdicts.append(f"{what}: hardly reads it: {shown}")
        elif found is within:
            verdicts.append(f"{what}: tells its texts apart: {shown}")
        elif found.auc < WEAK:
            verdicts.append(f"{what}: weak: {shown}")
        else:
            verdicts.append(f"{what}: {'fair' if found.auc < FAIR else 'good'}: {shown}")
    return verdicts
