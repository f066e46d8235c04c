"""The tokenizer adapter: what ends a text, what a prompt looks like, what stays text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import pre_tokenizers

from grpo_jax.assets import synthetic
from grpo_jax.text import tokenizer as tokenizer_lib
from grpo_jax.text.tokenizer import Tokenizer, load_pretrained

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|pad|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_tokenizer_without_template(llama_folder: Path) -> None:
    tokenizer = Tokenizer.load(llama_folder)
    assert tokenizer.vocab_size == 259
    assert (tokenizer.eos_id, tokenizer.eos_ids) == (256, (256,))
    text = "bar\u0254\u0300k, \u0f56\u0f7c\u0f51 <|endoftext|>"  # what looks special stays text
    ids = tokenizer.encode(text)
    assert max(ids) < 256 and bytes(ids).decode() == text
    assert tokenizer.decode([[258, *ids, 256], [], [32, 97, 32, 257]]) == [text, "", "a"]
    assert tokenizer.encode_prompt("a", chat=False) == [97]
    with pytest.raises(ValueError, match="no chat template; set chat = False"):
        tokenizer.encode_prompt("a")
    with pytest.raises(ValueError, match="needs chat = True"):
        tokenizer.encode_prompt("a", system="b", chat=False)


def test_tokenizer_with_template(llama_folder: Path) -> None:
    (llama_folder / "chat_template.jinja").write_text(TEMPLATE)
    edit_json(llama_folder / "generation_config.json", eos_token_id=[10, 256])
    tokenizer = Tokenizer.load(llama_folder)
    assert tokenizer.eos_id == 257  # the template's end of turn comes first
    assert tokenizer.eos_ids == (257, 256, 10)
    plain = [*b"user: hi", 257, *b"assistant: "]
    assert tokenizer.encode_prompt("hi") == plain
    assert tokenizer.encode_prompt("hi", system="be") == [*b"system: be", 257, *plain]
    (llama_folder / "chat_template.jinja").write_text("{{ raise_exception('no system role') }}")
    with pytest.raises(ValueError, match="chat template refuses messages.*no system role"):
        Tokenizer.load(llama_folder)


def test_plain_prompt_gets_the_bos_that_the_tokenizer_adds(llama_folder: Path) -> None:
    single = [
        {"SpecialToken": {"id": "<|bos|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    special = {"<|bos|>": {"id": "<|bos|>", "ids": [258], "tokens": ["<|bos|>"]}}
    processor = {"type": "TemplateProcessing", "single": single, "pair": single * 2}
    edit_json(
        llama_folder / "tokenizer.json", post_processor=processor | {"special_tokens": special}
    )
    tokenizer = Tokenizer.load(llama_folder)
    assert tokenizer.encode("a") == [97]
    assert tokenizer.encode_prompt("a", chat=False) == [258, 97]


def test_no_end_of_sequence_is_an_error(llama_folder: Path) -> None:
    edit_json(llama_folder / "tokenizer_config.json", eos_token=None)
    (llama_folder / "generation_config.json").unlink()
    with pytest.raises(ValueError, match="no end-of-sequence token; set eos_token"):
        Tokenizer.load(llama_folder)


def test_texts_that_the_tokenizer_has_no_ids_for_are_an_error(llama_folder: Path) -> None:
    model = {"type": "WordPiece", "unk_token": "[UNK]", "vocab": {"a": 0, "<|end|>": 1},
             "continuing_subword_prefix": "##", "max_input_chars_per_word": 9}  # fmt: skip
    edit_json(
        llama_folder / "tokenizer.json", model=model, added_tokens=[], pre_tokenizer=None,
        decoder=None, post_processor=None,
    )  # fmt: skip
    (llama_folder / "generation_config.json").unlink()
    tokenizer = Tokenizer.load(llama_folder)
    assert tokenizer.encode("a") == [0]
    with pytest.raises(ValueError, match=r"cannot encode 'b': .*Missing \[UNK\] token"):
        tokenizer.encode("b")
    edit_json(llama_folder / "tokenizer_config.json", model_max_length="~")
    with pytest.raises(ValueError, match="model_max_length is '~', wanted a number"):
        Tokenizer.load(llama_folder)


# sentencepiece models as the families have them; XLM-R's ids are sentencepiece's plus one.
SPACES = {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True}
BYTES = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
TURNS = ["<start_of_turn>", "<end_of_turn>", "\n\n", "\u2581\u2581", "\u2581\u2581\u2581"]
GEMMA_IDS = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "add_dummy_prefix": False}
GEMMA_PIECES = {"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>"}
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("tokenizer.model", {**BYTES, **SPACES}, {"tokenizer_class": "LlamaTokenizer"}),
    "gemma": (
        "tokenizer.model",
        {**BYTES, **SPACES, **GEMMA_IDS, **GEMMA_PIECES, "user_defined_symbols": TURNS},
        {"tokenizer_class": "GemmaTokenizer"},
    ),
    "normalising": ("spm.model", {"model_type": "bpe", "byte_fallback": True}, {}),
    "no bytes": ("spiece.model", {"model_type": "bpe", **SPACES}, {}),
    "xlm-roberta": (
        "sentencepiece.bpe.model",
        {"model_type": "unigram"},
        {"tokenizer_class": "XLMRobertaTokenizer"},
    ),
}
NASTY = [
    "hello", "  two  spaces ", " lead", "tail  ", "a\nb\n\n c", "tab\there", "\U0001f600\u200dx",
    "\u0f56\u0f7c\u0f51\u0f0b\u0f66\u0f90\u0f51\u0f0b\u0f61\u0f72\u0f42", "Ba'aa waa\u2019ee",
    "", " ", "   ", "\u2581a \u2581\u2581 b", "\ufb01 \u00bd \uff21 e\u0301", "12345 3.14",
    "\u3000wide\u00a0nbsp",
]  # fmt: skip
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def write_sentencepiece(folder: Path, family: str, **config: object) -> Any:
    """A folder with only a sentencepiece model, trained on the spot, and its configuration."""
    name, options, settings = FAMILIES[family]
    rows = synthetic.pairs()[:300]
    folder.mkdir(exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([row[key] for row in rows for key in ("source", "target")]),
        model_prefix=str(folder / "trained"),
        vocab_size=360 if options.get("byte_fallback") else 80,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    (folder / "trained.model").rename(folder / name)
    (folder / "trained.vocab").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | config))
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / name))


@pytest.mark.parametrize("family", FAMILIES)
def test_only_a_sentencepiece_model_gives_its_ids(family: str, tmp_path: Path) -> None:
    pieces = write_sentencepiece(tmp_path / "model", family)
    texts = NASTY + [row["target"] for row in synthetic.pairs()[300:400]]
    if family == "xlm-roberta":
        pretrained = load_pretrained(tmp_path / "model")
        for text in texts:
            ids = [i + 1 if i else 3 for i in pieces.encode(text)]
            assert pretrained(text, add_special_tokens=False)["input_ids"] == ids, text
            assert pretrained(text)["input_ids"] == [0, *ids, 2]
        return
    tokenizer = Tokenizer.load(tmp_path / "model")
    assert tokenizer.vocab_size == pieces.get_piece_size()
    for text in [*texts, "a <unk> </s> <eos>"]:  # what looks special stays text
        ids = tokenizer.encode(text)
        assert ids == pieces.encode(text), text
        if family != "no bytes":  # sentencepiece writes its own sign for what it does not know
            assert tokenizer.pretrained.decode(ids) == pieces.decode(ids)
    assert tokenizer.encode_prompt("a", chat=False) == [pieces.bos_id(), *pieces.encode("a")]
    # The exported folder encodes in the same way for whoever loads its tokenizer.json.
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    shutil.copy(tmp_path / "model/config.json", tmp_path / "saved")  # names the model's family
    assert (tmp_path / "saved" / FAMILIES[family][0]).is_file()
    saved = Tokenizer.load(tmp_path / "saved")
    assert [saved.encode(text) for text in texts] == [tokenizer.encode(text) for text in texts]


def test_gemma_from_its_model_file(tmp_path: Path) -> None:
    pieces = write_sentencepiece(tmp_path, "gemma", chat_template=GEMMA_TEMPLATE)
    tokenizer = Tokenizer.load(tmp_path)
    turn, end = (pieces.piece_to_id(t) for t in ("<start_of_turn>", "<end_of_turn>"))
    assert (tokenizer.eos_id, tokenizer.eos_ids) == (end, (end, pieces.eos_id()))
    ids = tokenizer.encode_prompt("a <end_of_turn> b")
    assert ids.count(pieces.bos_id()) == 1 and ids.count(turn) == 2  # BOS once, by the template
    assert ids[0] == pieces.bos_id()
    assert tokenizer.decode([[turn, *pieces.encode("a"), end]]) == ["a"]
    with pytest.raises(ValueError, match=r"refuses messages of \['system', 'user'\].*not support"):
        tokenizer.encode_prompt("a", system="b")


def test_added_tokens_and_ends_of_a_sentencepiece_folder(tmp_path: Path) -> None:
    pieces = write_sentencepiece(tmp_path, "llama", add_bos_token=False, add_eos_token=True)
    size = pieces.get_piece_size()
    added = {str(size): {"content": "<|end|>", "special": True}}
    edit_json(tmp_path / "tokenizer_config.json", added_tokens_decoder=added, eos_token="<|end|>")
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.eos_ids) == (size + 1, (size,))
    assert tokenizer.pretrained("a")["input_ids"] == [*pieces.encode("a"), size]
    assert tokenizer.encode_prompt("a", chat=False) == pieces.encode("a")
    edit_json(tmp_path / "tokenizer_config.json", added_tokens_decoder={"1": {"content": "<x>"}})
    with pytest.raises(ValueError, match="added token '<x>' is 1 in .* but"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # as tiktoken writes it
    with pytest.raises(ValueError, match="not a sentencepiece model.*tiktoken"):
        Tokenizer.load(tmp_path)


def test_a_unigram_model_that_transformers_would_cut_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sentencepiece(tmp_path, "xlm-roberta")
    read = tokenizer_lib._from_pretrained

    def otherwise(folder: Path, named: Path) -> Any:  # as some of its versions do, with some files
        pretrained = read(folder, named)
        pretrained.backend_tokenizer.pre_tokenizer = pre_tokenizers.UnicodeScripts()
        return pretrained

    load_pretrained(tmp_path)
    monkeypatch.setattr(tokenizer_lib, "_from_pretrained", otherwise)
    with pytest.raises(ValueError, match="set tokenizer_class in tokenizer_config.json"):
        load_pretrained(tmp_path)


def test_templates_neither_think_nor_read_the_clock(llama_folder: Path) -> None:
    """As Qwen3's, Llama 3's and SmolLM3's templates ask for it."""
    (llama_folder / "chat_template.jinja").write_text(
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
        "{% endif %}{{ date_string }}|{{ strftime_now('%d %B %Y') }}|"
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}"
        "{% if enable_thinking is defined and enable_thinking is false %}<think></think>"
        "{% endif %}{% endif %}"
    )
    prompt = bytes(Tokenizer.load(llama_folder).encode_prompt("hi")).decode()
    assert prompt == "26 Jul 2024|26 July 2024|hi<think></think>"
    (llama_folder / "chat_template.jinja").write_text("{{ strftime_now(messages[0].content) }}")
    with pytest.raises(ValueError, match="write the date or its format into the template"):
        Tokenizer.load(llama_folder)


def test_llama_3_gets_one_bos(llama_folder: Path) -> None:
    """Its tokenizer.json adds BOS, and so does its template."""
    test_plain_prompt_gets_the_bos_that_the_tokenizer_adds(llama_folder)
    edit_json(llama_folder / "tokenizer_config.json", bos_token="<|bos|>")
    (llama_folder / "chat_template.jinja").write_text("{{ bos_token }}" + TEMPLATE)
    assert Tokenizer.load(llama_folder).encode_prompt("a").count(258) == 1
