"""The tokenizer adapter: what ends a text, what a prompt looks like, what stays text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grpo_jax.text.tokenizer import Tokenizer

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
