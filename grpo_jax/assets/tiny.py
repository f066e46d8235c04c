"""A tiny random policy and sentence encoder, as ordinary Hugging Face folders made in code.

The decoder is a two-layer llama over bytes. The encoder is a two-layer BERT over the synthetic
language's words whose mean of token vectors is nearly the mean of random word vectors, so the
cosine of two texts grows with the words they share; unknown words fall apart into letters.
"""

from __future__ import annotations

import json
import string
from pathlib import Path

import numpy as np

from grpo_jax.assets import synthetic

HIDDEN = 64
LAYERS = 2
HEADS = 4
KV_HEADS = 2
FFN = 192
MAX_POSITIONS = 512
SPECIALS = ("<|endoftext|>", "<|pad|>", "<|bos|>")  # behind the 256 bytes
VOCAB = 256 + len(SPECIALS)
_PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def write_decoder(folder: Path) -> None:
    """Writes a random llama decoder over bytes: config.json, model.safetensors and tokenizer."""
    from safetensors.numpy import save_file

    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB,
        "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS, "hidden_act": "silu", "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "attention_bias": False, "mlp_bias": False,
        "tie_word_embeddings": False, "bos_token_id": 258, "eos_token_id": 256,
        "pad_token_id": 257, "torch_dtype": "float32",
    }  # fmt: skip
    draw = np.random.default_rng(0)
    keys = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (keys, HIDDEN),
        "self_attn.v_proj": (keys, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (FFN, HIDDEN), "mlp.up_proj": (FFN, HIDDEN),
        "mlp.down_proj": (HIDDEN, FFN),
    }  # fmt: skip
    tensors = {
        "model.embed_tokens.weight": draw.normal(0, 1, (VOCAB, HIDDEN)),
        "model.norm.weight": np.ones(HIDDEN),
        "lm_head.weight": draw.normal(0, HIDDEN**-0.5, (VOCAB, HIDDEN)),
    }
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            norm = len(shape) == 1
            value = np.ones(shape) if norm else draw.normal(0, shape[-1] ** -0.5, shape)
            tensors[f"model.layers.{layer}.{name}.weight"] = value
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": 258, "eos_token_id": 256, "pad_token_id": 257},
    )
    save_file(_float32(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "tokenizer.json", _byte_tokenizer())
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": MAX_POSITIONS,
            "eos_token": SPECIALS[0], "pad_token": SPECIALS[1], "bos_token": SPECIALS[2],
            "clean_up_tokenization_spaces": False,
        },
    )  # fmt: skip


def write_encoder(folder: Path) -> None:
    """Writes a random BERT sentence encoder in the sentence-transformers layout."""
    from safetensors.numpy import save_file

    vocab = _word_pieces()
    config = {
        "architectures": ["BertModel"], "model_type": "bert", "vocab_size": len(vocab),
        "hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "hidden_act": "gelu", "max_position_embeddings": 128,
        "type_vocab_size": 2, "layer_norm_eps": 1e-12, "pad_token_id": 0,
        "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
        "position_embedding_type": "absolute", "torch_dtype": "float32",
    }  # fmt: skip
    save_file(_float32(_encoder_tensors(len(vocab))), folder / "model.safetensors")
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": 128, "do_lower_case": False}
    )
    _write_json(
        folder / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(
                (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
            )
        ],
    )
    (folder / "1_Pooling").mkdir()
    (folder / "2_Normalize").mkdir()
    _write_json(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": HIDDEN, "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
    )  # fmt: skip
    _write_json(folder / "tokenizer.json", _word_tokenizer(vocab))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 128,
            "pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
            "clean_up_tokenization_spaces": False,
        },
    )  # fmt: skip


def _encoder_tensors(vocab_size: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(1)
    words = draw.normal(0, 1, (vocab_size, HIDDEN))
    # Whole words are orthogonal: rows of a Hadamard matrix, +-1 with mean 0 as layer norm likes it.
    whole = len(_PIECES) + len(synthetic.target_words()) + 1
    words[:whole] = [
        [(-1) ** (row & column).bit_count() for column in range(HIDDEN)]
        for row in range(1, whole + 1)
    ]
    # [CLS] and [SEP] stand in every text; opposite rows cancel in the mean over tokens.
    words[_PIECES.index("[SEP]")] = -words[_PIECES.index("[CLS]")]
    tensors = {
        "embeddings.word_embeddings.weight": words,
        "embeddings.position_embeddings.weight": draw.normal(0, 0.3, (128, HIDDEN)),
        "embeddings.token_type_embeddings.weight": np.zeros((2, HIDDEN)),
        "embeddings.LayerNorm.weight": np.ones(HIDDEN),
        "embeddings.LayerNorm.bias": np.zeros(HIDDEN),
        "pooler.dense.weight": draw.normal(0, 0.02, (HIDDEN, HIDDEN)),
        "pooler.dense.bias": np.zeros(HIDDEN),
    }
    linears = {
        "attention.self.query": (HIDDEN, HIDDEN), "attention.self.key": (HIDDEN, HIDDEN),
        "attention.self.value": (HIDDEN, HIDDEN), "attention.output.dense": (HIDDEN, HIDDEN),
        "intermediate.dense": (2 * HIDDEN, HIDDEN), "output.dense": (HIDDEN, 2 * HIDDEN),
    }  # fmt: skip
    for layer in range(LAYERS):
        prefix = f"encoder.layer.{layer}."
        for name, shape in linears.items():
            tensors[f"{prefix}{name}.weight"] = draw.normal(0, 0.05, shape)
            tensors[f"{prefix}{name}.bias"] = np.zeros(shape[0])
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            tensors[f"{prefix}{name}.weight"] = np.ones(HIDDEN)
            tensors[f"{prefix}{name}.bias"] = np.zeros(HIDDEN)
    return tensors


def _byte_chars() -> list[str]:
    """The 256 characters that stand for bytes in byte-level BPE files (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _byte_tokenizer() -> dict:
    """tokenizer.json: token id = byte value; no merges."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [_added(256 + i, token) for i, token in enumerate(SPECIALS)],
        "normalizer": None, "pre_tokenizer": {**level, "use_regex": False}, "post_processor": None,
        "decoder": {**level, "use_regex": False},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "vocab": {char: byte for byte, char in enumerate(_byte_chars())}, "merges": [],
        },
    }  # fmt: skip


def _word_pieces() -> list[str]:
    letters = string.ascii_lowercase + string.digits + "'-"
    return [*_PIECES, *synthetic.target_words(), "and", *letters, *(f"##{c}" for c in letters)]


def _word_tokenizer(vocab: list[str]) -> dict:
    """tokenizer.json: lower-cased WordPiece, as BERT's."""
    cls, sep = _PIECES.index("[CLS]"), _PIECES.index("[SEP]")
    text = {"Sequence": {"id": "A", "type_id": 0}}

    def special(token: str) -> dict:
        return {"SpecialToken": {"id": token, "type_id": 0}}

    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [_added(i, token) for i, token in enumerate(_PIECES)],
        "normalizer": {
            "type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
            "strip_accents": None, "lowercase": True,
        },
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": {
            "type": "TemplateProcessing", "single": [special("[CLS]"), text, special("[SEP]")],
            "pair": [
                special("[CLS]"), text, special("[SEP]"),
                {"Sequence": {"id": "B", "type_id": 1}}, special("[SEP]"),
            ],
            "special_tokens": {
                "[CLS]": {"id": "[CLS]", "ids": [cls], "tokens": ["[CLS]"]},
                "[SEP]": {"id": "[SEP]", "ids": [sep], "tokens": ["[SEP]"]},
            },
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": {piece: i for i, piece in enumerate(vocab)},
        },
    }  # fmt: skip


def _added(index: int, token: str) -> dict:
    return {
        "id": index, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False, "special": True,
    }  # fmt: skip


def _float32(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
