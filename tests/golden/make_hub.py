"""Random tiny models as Hugging Face folders, and what torch computes from them.

`write_decoder` and `write_encoder` need NumPy only and are what the tests load. Run as a script,
with torch, transformers and sentence-transformers installed, this file stores the references:

    python tests/golden/make_hub.py             # hub.npz, from the random models
    python tests/golden/make_hub.py --assets    # hub_assets.json, from the downloaded models

Weights are scaled up, and norms, biases and rope_theta are unusual, so that a mistake in any of
them moves the numbers by far more than 1e-4.
"""

from __future__ import annotations

import json
import string
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
VOCAB, HIDDEN, FFN, LAYERS, HEADS, KV_HEADS = 259, 32, 48, 2, 4, 2
DECODERS = {
    # rope_theta in the old place, untied head
    "llama": {"model_type": "llama", "rope_theta": 50.0, "tie_word_embeddings": False},
    # biases on q, k, v; rope_theta in the new place; tied head
    "qwen2": {
        "model_type": "qwen2",
        "rope_parameters": {"rope_type": "default", "rope_theta": 70.0},
        "tie_word_embeddings": True,
        "sliding_window": 8,
        "use_sliding_window": False,
    },
    # norms on q and k; heads wider than D / N
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "rope_theta": 90, "tie_word_embeddings": True},
}
ENCODERS = ("mean", "cls", "max")
TEXTS = [
    "the cat sat on the mat",
    "a cat",
    "Dogs and CATS are not the same, are they?",
    "",
    "a long text that goes on and on until it is cut off by the limit of the encoder",
    "caf\u00e9 \u732b",
]
PAIRS = [
    ["A man is playing a guitar.", "Someone plays an instrument."],
    ["A man is playing a guitar.", "The stock market fell sharply today."],
    ["Inserts a table into the document.", "Adds a new table to the file."],
    ["Inserts a table into the document.", ""],
    ["Opens the dialog where you can select a font. " * 30, "Opens a dialog for fonts."],
    ["\u732b\u304c\u7a93\u3067\u7720\u308b\u3002", "The cat sleeps at the window."],
]
PASSAGE = (
    "The sun rises in the east and sets in the west. Water freezes at zero degrees Celsius and "
    "boils at one hundred degrees. Plants use sunlight, water and carbon dioxide to make their own "
    "food, and they release oxygen into the air. People all over the world depend on farmers to "
    "grow the food that they eat every day."
)


def decoder_ids() -> np.ndarray:
    """int32 [2, 24]: input of the golden logits."""
    return np.random.default_rng(5).integers(0, VOCAB, (2, 24)).astype(np.int32)


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def write_tensors(path: Path, shapes: dict[str, tuple[int, ...]], seed: int) -> None:
    """Norm weights about 1, the rest normal with a standard deviation that lets signals grow."""
    from safetensors.numpy import save_file

    draw = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes.items():
        if "norm" in name.lower() and name.endswith("weight"):
            value = draw.uniform(0.5, 1.5, shape)
        else:
            value = draw.normal(0, 0.5 if len(shape) == 1 else 1.5 * shape[-1] ** -0.5, shape)
        tensors[name] = value.astype(np.float32)
    save_file(tensors, path, metadata={"format": "pt"})


def decoder_shapes(kind: str) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes as transformers has them."""
    head_dim = DECODERS[kind].get("head_dim", HIDDEN // HEADS)
    q, kv = HEADS * head_dim, KV_HEADS * head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for i in range(LAYERS):
        layer = {
            "input_layernorm.weight": (HIDDEN,),
            "self_attn.q_proj.weight": (q, HIDDEN),
            "self_attn.k_proj.weight": (kv, HIDDEN),
            "self_attn.v_proj.weight": (kv, HIDDEN),
            "self_attn.o_proj.weight": (HIDDEN, q),
            "post_attention_layernorm.weight": (HIDDEN,),
            "mlp.gate_proj.weight": (FFN, HIDDEN),
            "mlp.up_proj.weight": (FFN, HIDDEN),
            "mlp.down_proj.weight": (HIDDEN, FFN),
        }
        if kind == "qwen2":
            layer |= {f"self_attn.{p}_proj.bias": (q if p == "q" else kv,) for p in "qkv"}
        if kind == "qwen3":
            layer |= {f"self_attn.{p}_norm.weight": (head_dim,) for p in "qk"}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (HIDDEN,)
    if not DECODERS[kind]["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    return shapes


def write_decoder(folder: Path, kind: str) -> None:
    """A random decoder over bytes, of the family `kind`."""
    from grpo_jax.assets import tiny

    folder.mkdir(parents=True, exist_ok=True)
    tiny.write_decoder(folder)  # its tokenizer; config and weights are replaced
    config = {
        "architectures": ["AnyForCausalLM"], "vocab_size": VOCAB, "hidden_size": HIDDEN,
        "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "hidden_act": "silu", "max_position_embeddings": 128,
        "rms_norm_eps": 1e-3, "bos_token_id": 258, "eos_token_id": 256, "pad_token_id": 257,
        "torch_dtype": "float32",
    }  # fmt: skip
    write_json(folder / "config.json", config | DECODERS[kind])
    write_tensors(folder / "model.safetensors", decoder_shapes(kind), seed=len(kind))


def write_encoder(folder: Path, kind: str) -> None:
    """A random BERT in the sentence-transformers layout; `kind` names the pooling.

    mean: then Normalize. cls: then Dense with tanh, Normalize. max: then Dense without bias.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocab = _write_word_pieces(folder)
    config = {
        "architectures": ["BertModel"], "model_type": "bert", "vocab_size": len(vocab),
        "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "hidden_act": "gelu", "max_position_embeddings": 32,
        "type_vocab_size": 2, "layer_norm_eps": 1e-3, "pad_token_id": 0,
    }  # fmt: skip
    write_json(folder / "config.json", config)
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (len(vocab), HIDDEN),
        "embeddings.position_embeddings.weight": (32, HIDDEN),
        "embeddings.token_type_embeddings.weight": (2, HIDDEN),
        "embeddings.LayerNorm.weight": (HIDDEN,),
        "embeddings.LayerNorm.bias": (HIDDEN,),
        "pooler.dense.weight": (HIDDEN, HIDDEN),
        "pooler.dense.bias": (HIDDEN,),
    }
    square = ("attention.self.query", "attention.self.key", "attention.self.value")
    for i in range(LAYERS):
        linears = dict.fromkeys((*square, "attention.output.dense"), (HIDDEN, HIDDEN))
        linears |= {"intermediate.dense": (FFN, HIDDEN), "output.dense": (HIDDEN, FFN)}
        for name, shape in linears.items():
            shapes[f"encoder.layer.{i}.{name}.weight"] = shape
            shapes[f"encoder.layer.{i}.{name}.bias"] = shape[:1]
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"encoder.layer.{i}.{name}.weight"] = (HIDDEN,)
            shapes[f"encoder.layer.{i}.{name}.bias"] = (HIDDEN,)
    write_tensors(folder / "model.safetensors", shapes, seed=11)
    _write_modules(folder, kind)


def _write_modules(folder: Path, kind: str) -> None:
    chain = {
        "mean": ["Transformer", "Pooling", "Normalize"],
        "cls": ["Transformer", "Pooling", "Dense", "Normalize"],
        "max": ["Transformer", "Pooling", "Dense"],
    }[kind]
    paths = ["" if i == 0 else f"{i}_{name}" for i, name in enumerate(chain)]
    write_json(
        folder / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
            for i, (path, name) in enumerate(zip(paths, chain, strict=True))
        ],
    )
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 16, "do_lower_case": False})
    if kind == "cls":  # the form that sentence-transformers 6 writes
        pooling = {"embedding_dimension": HIDDEN, "pooling_mode": "cls", "include_prompt": True}
    else:
        modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
        pooling = {f"pooling_mode_{mode}": mode == f"{kind}_tokens" for mode in modes}
        pooling["word_embedding_dimension"] = HIDDEN
    write_json(folder / "1_Pooling/config.json", pooling)
    if "Dense" in chain:
        name = "activation.Tanh" if kind == "cls" else "linear.Identity"
        dense = {
            "in_features": HIDDEN,
            "out_features": 24,
            "bias": kind == "cls",
            "activation_function": f"torch.nn.modules.{name}",
        }
        write_json(folder / "2_Dense/config.json", dense)
        shapes: dict[str, tuple[int, ...]] = {"linear.weight": (24, HIDDEN)}
        if kind == "cls":
            shapes["linear.bias"] = (24,)
        write_tensors(folder / "2_Dense/model.safetensors", shapes, seed=12)


def _write_word_pieces(folder: Path) -> dict[str, int]:
    """A lower-casing WordPiece tokenizer whose file also truncates and pads, as MiniLM's does."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    letters = string.ascii_lowercase + ",?"
    words = ["the", "cat", "mat", "on", "and", "##s", *letters]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words, *(f"##{c}" for c in letters if c != "s")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    extra = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 32}
    write_json(folder / "tokenizer_config.json", names | extra)
    return vocab


def _decoder_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    with torch.no_grad():
        return model.eval()(torch.from_numpy(ids).long()).logits.numpy()


def _embeddings(folder: Path, texts: list[str]) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu").encode(texts, convert_to_numpy=True)


def make_random() -> None:
    import tempfile

    golden = {}
    with tempfile.TemporaryDirectory() as temporary:
        for kind in DECODERS:
            write_decoder(Path(temporary) / kind, kind)
            golden[kind] = _decoder_logits(Path(temporary) / kind, decoder_ids())
        for kind in ENCODERS:
            write_encoder(Path(temporary) / kind, kind)
            golden[kind] = _embeddings(Path(temporary) / kind, TEXTS)
    np.savez_compressed(HERE / "hub.npz", **golden)
    print({name: (value.shape, float(np.abs(value).max())) for name, value in golden.items()})


def make_assets() -> None:
    from transformers import AutoTokenizer

    from grpo_jax.assets import resolve

    folder = Path(resolve("asset:smollm2-135m-instruct"))
    ids = AutoTokenizer.from_pretrained(folder)(PASSAGE)["input_ids"]
    logits = _decoder_logits(folder, np.asarray([ids]))[0]
    top = np.argsort(-logits, axis=-1)[:, :3]
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    vectors = _embeddings(
        Path(resolve("asset:all-minilm-l6-v2")), [text for pair in PAIRS for text in pair]
    )
    golden = {
        "ids": ids,
        "top": top.tolist(),
        "logits": np.take_along_axis(logits, top, axis=-1).round(5).tolist(),
        "perplexity": float(np.exp(-logps[np.arange(len(ids) - 1), ids[1:]].mean())),
        "cosines": (vectors[::2] * vectors[1::2]).sum(-1).astype(float).round(6).tolist(),
        "embedding": vectors[0, :16].astype(float).round(6).tolist(),
    }
    write_json(HERE / "hub_assets.json", golden)
    print(golden["perplexity"], golden["cosines"])


if __name__ == "__main__":
    make_assets() if "--assets" in sys.argv else make_random()
