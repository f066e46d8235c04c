"""Random tiny sentence encoders of every family, and what sentence-transformers computes from them.

`write_encoder` needs NumPy and tokenizers only and is what the tests load. Run as a script, with
torch, transformers and sentence-transformers installed, this file stores the references:

    PYTHONPATH=.:tests python tests/golden/make_encoders.py    # encoders.npz and encoders.json

Weights are scaled up, and norms, biases and epsilons are unusual, so that a mistake in any of them
moves the numbers by far more than 1e-5. BERT itself, with the three older poolings, is in make_hub.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from golden.make_hub import write_json, write_tensors

HERE = Path(__file__).parent
HIDDEN, FFN, LAYERS, HEADS, POSITIONS = 36, 44, 3, 3, 150
WORDS = ("the", "cat", "sat", "on", "mat", "and", "dogs", "are", "not", "same", "query", "text")
TEXTS = [
    "the cat sat on the mat",
    "a cat",
    "Dogs and CATS are not the same, are they?",
    "",
    "the cat and the dogs sat on the mat and are not the same " * 12,  # farther than 128 tokens
    "caf\u00e9 \u732b <pad> the </s> cat",
    "  the cat sat   on the mat ",
]
FAMILIES: dict[str, dict[str, Any]] = {
    # As BGE-M3 and CINO: a whole pre-training model's tensors, more rows than the tokenizer uses.
    "xlm-roberta": {
        "model_type": "xlm-roberta", "type_vocab_size": 1, "pad_token_id": 1,
        "layer_norm_eps": 1e-3, "bos_token_id": 0, "eos_token_id": 2,
    },
    "roberta": {"model_type": "roberta", "type_vocab_size": 2, "pad_token_id": 1},
    "mpnet": {
        "model_type": "mpnet", "relative_attention_num_buckets": 32, "layer_norm_eps": 1e-2,
        "pad_token_id": 1,
    },
    "bert": {"model_type": "bert", "pad_token_id": 0, "layer_norm_eps": 1e-3},
    # As Qwen3-Embedding: a decoder without "model." before its tensors.
    "qwen3": {
        "model_type": "qwen3", "num_key_value_heads": 1, "head_dim": 14, "rope_theta": 90,
        "tie_word_embeddings": True, "rms_norm_eps": 1e-3,
    },
}  # fmt: skip
PROMPTS = {"query": "query: the\ntext:", "document": ""}
QUERY = {"prompts": PROMPTS, "default_prompt_name": "query"}
# name -> family, modules behind the transformer, settings, prompts
ENCODERS: dict[str, dict[str, Any]] = {
    "xlmr": {"family": "xlm-roberta", "pooling": "cls", "then": ("Normalize",)},
    "roberta": {
        "family": "roberta", "pooling": ["mean_sqrt_len_tokens", "max"], "then": ("Dense",),
        "settings": {"max_seq_length": 40, "do_lower_case": True},
    },
    "mpnet": {"family": "mpnet", "pooling": "mean", "then": ("Normalize",)},
    "instruct": {
        "family": "bert", "pooling": "mean", "then": ("Dense", "Normalize"),
        "include_prompt": False, "prompts": QUERY,
    },
    "qwen3": {
        "family": "qwen3", "pooling": "lasttoken", "then": ("Normalize",), "end": True,
        "prompts": {"prompts": PROMPTS, "default_prompt_name": None},
    },
    "weighted": {
        "family": "qwen3", "pooling": "weightedmean", "then": (), "include_prompt": False,
        "prompts": QUERY,
    },
}  # fmt: skip
# name -> encoder, arguments of both load_encoder and SentenceTransformer.encode
CASES: dict[str, tuple[str, dict[str, str]]] = {
    **{name: (name, {}) for name in ENCODERS},
    "qwen3-query": ("qwen3", {"prompt_name": "query"}),
    "mpnet-literal": ("mpnet", {"prompt": "dogs: "}),
    "instruct-none": ("instruct", {"prompt": ""}),
    "weighted-document": ("weighted", {"prompt_name": "document"}),
}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
_LARGE |= {"intermediate_size": 4096}
_XLMR = {"model_type": "xlm-roberta", "max_position_embeddings": 514, "type_vocab_size": 1}
_XLMR |= {"pad_token_id": 1, "vocab_size": 250002, "output_past": True, "layer_norm_eps": 1e-5}
_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
_BASE |= {"intermediate_size": 3072}
_SMALL = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
_QWEN = {
    "model_type": "qwen3", "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 1000000,
    "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "hidden_act": "silu",
    "rope_scaling": None, "sliding_window": None, "use_sliding_window": False,
    "max_window_layers": 28, "attention_bias": False,
}  # fmt: skip
# The architectures of published models, as their config.json has them.
PUBLISHED: dict[str, dict[str, Any]] = {
    "LaBSE": {
        "model_type": "bert", "vocab_size": 501153, "directionality": "bidi",
        "pooler_fc_size": 768, "position_embedding_type": "absolute",
    } | _BASE,
    "all-MiniLM-L6-v2": {
        "model_type": "bert", "vocab_size": 30522, "num_hidden_layers": 6,
    } | _SMALL,
    "xlm-roberta-base": _XLMR | _BASE,
    "xlm-roberta-large": _XLMR | _LARGE,
    "bge-m3": _XLMR | _LARGE | {"max_position_embeddings": 8194},
    "multilingual-e5-small": {
        "model_type": "bert", "vocab_size": 250037, "num_hidden_layers": 12,
    } | _SMALL,
    "cino-base-v2": _XLMR | _BASE | {"vocab_size": 135359},
    "all-mpnet-base-v2": {
        "model_type": "mpnet", "vocab_size": 30527, "max_position_embeddings": 514,
        "relative_attention_num_buckets": 32,
    } | _BASE,
    "Qwen3-Embedding-0.6B": _QWEN | {
        "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16,
        "intermediate_size": 3072, "vocab_size": 151669, "tie_word_embeddings": True,
    },
    "Qwen3-Embedding-8B": _QWEN | {
        "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32,
        "intermediate_size": 12288, "vocab_size": 151665, "tie_word_embeddings": False,
    },
}  # fmt: skip


def write_encoder(folder: Path, name: str) -> None:
    """One of ENCODERS in the sentence-transformers layout."""
    spec = ENCODERS[name]
    family = FAMILIES[spec["family"]]
    causal = spec["family"] == "qwen3"
    folder.mkdir(parents=True, exist_ok=True)
    size = write_tokenizer(folder, spec["family"], end=spec.get("end", False))
    size += 3 if spec["family"] == "xlm-roberta" else 0
    config = {
        "vocab_size": size, "hidden_size": HIDDEN, "intermediate_size": FFN,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS, "hidden_act": "silu" if causal else "gelu",
    }  # fmt: skip
    write_json(folder / "config.json", config | family)
    shapes = _decoder_shapes(size) if causal else _shapes(spec["family"], size)
    write_tensors(folder / "model.safetensors", shapes, seed=sum(map(ord, name)))
    _write_modules(folder, spec)


def _write_modules(folder: Path, spec: dict[str, Any]) -> None:
    kinds = ("Transformer", "Pooling", *spec["then"])
    paths = ["" if i == 0 else f"{i}_{kind}" for i, kind in enumerate(kinds)]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(zip(paths, kinds, strict=True))
    ]
    write_json(folder / "modules.json", modules)
    mode = spec["pooling"]
    pooling = {
        "word_embedding_dimension": HIDDEN,
        "include_prompt": spec.get("include_prompt", True),
    }
    if spec["family"] in ("bert", "qwen3"):  # the older form
        flags = ("cls_token", "mean_tokens", "weightedmean_tokens", "lasttoken")
        pooling |= {f"pooling_mode_{flag}": flag.removesuffix("_tokens") == mode for flag in flags}
    else:
        pooling["pooling_mode"] = mode
    write_json(folder / "1_Pooling/config.json", pooling)
    if "Dense" in spec["then"]:
        width = HIDDEN * (1 if isinstance(mode, str) else len(mode))
        name = "Tanh" if spec["family"] == "bert" else "GELU"
        activation = f"torch.nn.modules.activation.{name}"
        dense = {"in_features": width, "out_features": 20, "activation_function": activation}
        write_json(folder / "2_Dense/config.json", dense | {"bias": True})
        shapes = {"linear.weight": (20, width), "linear.bias": (20,)}
        write_tensors(folder / "2_Dense/model.safetensors", shapes, seed=3)
    if "settings" in spec:
        write_json(folder / "sentence_bert_config.json", spec["settings"])
    if "prompts" in spec:
        write_json(folder / "config_sentence_transformers.json", spec["prompts"])


def _shapes(family: str, size: int) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a bidirectional encoder, with parts that an encoder leaves out."""
    types = FAMILIES[family].get("type_vocab_size", 2)
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (size, HIDDEN),
        "embeddings.position_embeddings.weight": (POSITIONS, HIDDEN),
        "embeddings.LayerNorm.weight": (HIDDEN,),
        "embeddings.LayerNorm.bias": (HIDDEN,),
    }
    names = ("attention.self.query", "attention.self.key", "attention.self.value")
    names += ("attention.output.dense", "attention.output.LayerNorm")
    if family == "mpnet":
        names = ("attention.attn.q", "attention.attn.k", "attention.attn.v")
        names += ("attention.attn.o", "attention.LayerNorm")
        shapes["encoder.relative_attention_bias.weight"] = (32, HEADS)
    else:
        shapes["embeddings.token_type_embeddings.weight"] = (types, HIDDEN)
    for i in range(LAYERS):
        linears = {name: (HIDDEN, HIDDEN) for name in names[:4]}
        linears |= {"intermediate.dense": (FFN, HIDDEN), "output.dense": (HIDDEN, FFN)}
        for name, shape in linears.items():
            shapes[f"encoder.layer.{i}.{name}.weight"] = shape
            shapes[f"encoder.layer.{i}.{name}.bias"] = shape[:1]
        for name in (names[4], "output.LayerNorm"):
            shapes[f"encoder.layer.{i}.{name}.weight"] = (HIDDEN,)
            shapes[f"encoder.layer.{i}.{name}.bias"] = (HIDDEN,)
    if family == "bert":
        return shapes
    prefix = "mpnet." if family == "mpnet" else "roberta."
    shapes = {prefix + name: shape for name, shape in shapes.items()}
    shapes["lm_head.bias"] = (size,)
    for name in ("lm_head.dense", "lm_head.layer_norm"):
        shapes[f"{name}.weight"] = (HIDDEN, HIDDEN) if name.endswith("dense") else (HIDDEN,)
        shapes[f"{name}.bias"] = (HIDDEN,)
    return shapes


def _decoder_shapes(size: int) -> dict[str, tuple[int, ...]]:
    config = FAMILIES["qwen3"]
    head, kv = config["head_dim"], config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (size, HIDDEN)}
    for i in range(LAYERS):
        layer = {
            "input_layernorm.weight": (HIDDEN,),
            "self_attn.q_proj.weight": (HEADS * head, HIDDEN),
            "self_attn.k_proj.weight": (kv, HIDDEN),
            "self_attn.v_proj.weight": (kv, HIDDEN),
            "self_attn.o_proj.weight": (HIDDEN, HEADS * head),
            "self_attn.q_norm.weight": (head,),
            "self_attn.k_norm.weight": (head,),
            "post_attention_layernorm.weight": (HIDDEN,),
            "mlp.gate_proj.weight": (FFN, HIDDEN),
            "mlp.up_proj.weight": (FFN, HIDDEN),
            "mlp.down_proj.weight": (HIDDEN, FFN),
        }
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes | {"norm.weight": (HIDDEN,)}


def write_tokenizer(folder: Path, family: str, end: bool = False) -> int:
    """The family's kind of tokenizer over a few words; gives the number of its ids.

    Args:
      folder: where tokenizer.json goes.
      family: of FAMILIES.
      end: qwen3 only: put <|endoftext|> behind every text, as Qwen3-Embedding does.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    letters = "abcdefghijklmnopqrstuvwxyzACDST,?:<>|\u00e9"
    if family == "xlm-roberta":
        special = ["<s>", "<pad>", "</s>", "<unk>"]
        pieces = ["\u2581", *(f"\u2581{word}" for word in WORDS), *letters]
        scored = [(piece, 0.0) for piece in special]
        scored += [(piece, -1.0 - i / 10) for i, piece in enumerate(pieces)]
        tokenizer = Tokenizer(models.Unigram(scored, unk_id=3))
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    elif family in ("roberta", "qwen3"):
        special = ["<s>", "<pad>", "</s>", "<unk>"] if family == "roberta" else []
        merges = _merges()
        symbols = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
        vocab = {s: i for i, s in enumerate([*symbols, *(a + b for a, b in merges)])}
        tokenizer = Tokenizer(models.BPE(vocab, merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        from tokenizers import decoders

        tokenizer.decoder = decoders.ByteLevel()
        special = special or ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    else:
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
        if family == "mpnet":
            special = ["<s>", "<pad>", "</s>", "<unk>"]
        pieces = [*special, *WORDS, *letters, *(f"##{c}" for c in letters)]
        vocab = {piece: i for i, piece in enumerate(pieces)}
        unknown = special[3] if family == "mpnet" else special[1]
        tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=unknown))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(special)
    template = {
        "bert": "[CLS] $A [SEP]",
        "qwen3": "$A <|endoftext|>" if end else "$A",
    }.get(family, "<s> $A </s>")
    around = [(token, tokenizer.token_to_id(token)) for token in template.split() if token != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=around)
    tokenizer.save(str(folder / "tokenizer.json"))
    pad = {"bert": "[PAD]", "qwen3": "<|endoftext|>"}.get(family, "<pad>")
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": pad}
    if family == "qwen3":
        names["eos_token"] = "<|im_end|>"
    most = POSITIONS if family in ("bert", "qwen3") else POSITIONS - 2
    write_json(folder / "tokenizer_config.json", names | {"model_max_length": most})
    return tokenizer.get_vocab_size()


def _merges() -> list[tuple[str, str]]:
    """Merges that build each word letter by letter, with and without the space before it."""
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        for i in range(1, len(word)):
            merges[(word[:i], word[i])] = None
        merges[("\u0120", word)] = None
    return list(merges)


def make_embeddings() -> None:
    import tempfile

    import torch
    from sentence_transformers import SentenceTransformer

    golden = {}
    for case, (name, arguments) in CASES.items():
        with tempfile.TemporaryDirectory() as temporary:
            write_encoder(Path(temporary), name)
            model = SentenceTransformer(
                temporary, device="cpu", model_kwargs={"attn_implementation": "eager"}
            )
            assert next(model.parameters()).dtype == torch.float32
            golden[case] = model.encode(TEXTS, convert_to_numpy=True, **arguments)
    np.savez_compressed(HERE / "encoders.npz", **golden)
    print({name: (value.shape, float(np.abs(value).max())) for name, value in golden.items()})


def make_counts() -> None:
    """Parameters of transformers' own models at full size, whole and of the pooler."""
    import torch
    from transformers import AutoConfig, AutoModel

    counts = {}
    for name, config in PUBLISHED.items():
        with torch.device("meta"):
            model = AutoModel.from_config(AutoConfig.for_model(**config))
        pooler = getattr(model, "pooler", None)
        counts[name] = {
            "total": sum(p.numel() for p in model.parameters()),
            "pooler": sum(p.numel() for p in pooler.parameters()) if pooler else 0,
        }
    write_json(HERE / "encoders.json", counts)
    print(json.dumps(counts, indent=1))


if __name__ == "__main__":
    make_embeddings()
    make_counts()
