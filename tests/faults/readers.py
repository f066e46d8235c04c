"""Every reader of what strangers write, with small whole files to start from.

A reader is a function of a folder. It may raise ValueError and OSError, which its docstring
declares, and nothing else; what it returns is looked at too, because a file that is accepted must
hold what the rest of the program relies on.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.faults.mutate import Case

_TESTS = str(Path(__file__).resolve().parents[1])
if _TESTS not in sys.path:  # where pytest finds `golden` too
    sys.path.insert(0, _TESTS)


class Reader(NamedTuple):
    """What is read, and the folders to damage."""

    seeds: Callable[[Path], list[Case]]  # scratch folder -> whole cases
    read: Callable[[Path], Any]


def load(folder: Path, names: tuple[str, ...] = ()) -> Case:
    """The files below a folder; of `names`, where given."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    case = {str(file.relative_to(folder)): file.read_bytes() for file in files}
    return {name: data for name, data in case.items() if not names or name in names}


def store(case: Case, folder: Path) -> None:
    """The case as files."""
    for name, data in case.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


# Rows


ROWS = (
    {"source": "Akkam jirta?", "target": "How are you?", "group": 7},
    {"source": "\u0f56\u0f7c\u0f51 \u4e2d", "target": 'a "quoted", b', "group": "x"},
    {"source": "nested", "target": "t", "group": "g", "more": {"deep": ["a", 1.5, None]}},
)


def _row_seeds(suffix: str) -> Callable[[Path], list[Case]]:
    def seeds(scratch: Path) -> list[Case]:
        names = ("source", "target", "group")
        if suffix == "jsonl":
            text = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
            nested = '{"translation": {"om": "a", "en": "b"}, "source": "s", "target": "t"}\n'
            return [{"rows.jsonl": (text + "\n").encode()}, {"rows.jsonl": nested.encode()}]
        if suffix == "parquet":
            return _parquet_seeds(scratch)
        mark = {"csv": ",", "tsv": "\t"}[suffix]
        lines = [mark.join(names)]
        for row in ROWS:
            cells = [str(row[name]) for name in names]
            if suffix == "csv":
                cells = ['"' + cell.replace('"', '""') + '"' for cell in cells]
            lines.append(mark.join(cells))
        return [{f"rows.{suffix}": "\n".join(lines).encode()}]

    return seeds


def _parquet_seeds(scratch: Path) -> list[Case]:
    import pyarrow
    from pyarrow import parquet

    out = []
    columns = {name: [str(row[name]) for row in ROWS] for name in ("source", "target", "group")}
    for codec in ("none", "snappy", "zstd", "gzip"):
        for words in (True, False):
            table = pyarrow.table(columns)
            parquet.write_table(
                table, scratch / "rows.parquet", compression=codec, use_dictionary=words
            )
            out.append(load(scratch, ("rows.parquet",)))
    return out


def _read_rows(folder: Path) -> None:
    from grpo_jax import config
    from grpo_jax.data.sources import read_rows
    from grpo_jax.data.splits import split_rows

    file = next((str(p) for p in folder.iterdir()), str(folder / "rows.jsonl"))
    cfg = config.Data(on_bad_row="skip", group_field="group", target_optional=True)
    rows, skipped = read_rows(file, cfg)
    for text in (text for row in rows for text in row):
        text.encode()
    for line in skipped:
        assert len(line) < 2000, "a line of 2000 characters about one row"
    split_rows(rows, cfg)
    if file.endswith("l"):
        nested = config.Data(source_field="translation.om", target_field="source")
        nested.on_bad_row = "skip"
        read_rows(file, nested)
    read_rows(file, config.Data())


# Models


def _decoder_config_seeds(scratch: Path) -> list[Case]:
    from golden import families, make_hub

    configs = [families.family_json(name) for name in families.CASES]
    configs += [families.BASE | values for values in make_hub.DECODERS.values()]
    return [{"config.json": _json(config)} for config in configs]


def _read_decoder_config(folder: Path) -> None:
    from grpo_jax.hub.decoder_config import decoder_config, export_json

    _check_sizes(decoder_config(folder))
    json.dumps(export_json(folder), allow_nan=False).encode()


def _check_sizes(config: Any) -> None:
    """Sizes that int32 and memory can hold, and numbers that are finite."""
    for name, value in vars(config).items():
        if isinstance(value, int):
            assert value < 2**31, f"{name} is {value}"
        if isinstance(value, float):
            assert math.isfinite(value), f"{name} is {value}"


def _encoder_config_seeds(scratch: Path) -> list[Case]:
    base = {
        "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 32, "hidden_act": "gelu",
    }  # fmt: skip
    kinds: dict[str, dict[str, Any]] = {
        "bert": {"type_vocab_size": 2, "layer_norm_eps": 1e-12},
        "xlm-roberta": {"type_vocab_size": 1, "pad_token_id": 1},
        "mpnet": {"relative_attention_num_buckets": 32},
        "qwen3": {"hidden_act": "silu", "rope_theta": 1e6, "head_dim": 8, "num_key_value_heads": 2},
    }
    return [{"config.json": _json(base | {"model_type": k} | v)} for k, v in kinds.items()]


def _read_encoder_config(folder: Path) -> None:
    from grpo_jax.hub.encoder_config import family_config

    _check_sizes(family_config(folder)[1])


def _module_seeds(scratch: Path) -> list[Case]:
    from golden import make_encoders, make_hub

    out = []
    for kind in make_hub.ENCODERS:
        make_hub.write_encoder(scratch / kind, kind)
        out.append(load(scratch / kind))
    for name in make_encoders.ENCODERS:
        make_encoders.write_encoder(scratch / f"_{name}", name)
        out.append(load(scratch / f"_{name}"))
    left_out = ("model.safetensors", "tokenizer.json", "tokenizer_config.json")
    return [{k: v for k, v in case.items() if k not in left_out} for case in out]


def _read_modules(folder: Path) -> None:
    from grpo_jax.hub.encoder_config import family_config
    from grpo_jax.hub.modules import read_head, read_prompt, read_settings, transformer_folder

    transformer = transformer_folder(folder)
    assert transformer.resolve().is_relative_to(folder.resolve())
    read_settings(transformer)
    head = read_head(folder, family_config(transformer)[1].hidden_size, None, None)
    assert 0 < head.dim < 2**31
    read_prompt(folder, None, None).encode()


def _tokenizer_seeds(scratch: Path) -> list[Case]:
    from golden import make_encoders, make_hub

    names = (
        "tokenizer.json", "tokenizer_config.json", "generation_config.json", "tokenizer.model",
        "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    )  # fmt: skip
    make_hub.write_decoder(scratch / "bytes", "llama")
    plain = load(scratch / "bytes", names)
    out = [plain]
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|pad|>{% endfor %}"
    out.append(plain | {"chat_template.jinja": template.encode()})
    for family in ("bert", "xlm-roberta", "qwen3"):
        (scratch / family).mkdir()
        make_encoders.write_tokenizer(scratch / family, family)
        generation = {"generation_config.json": _json({"eos_token_id": [3]})}
        out.append(load(scratch / family, names) | generation)
    return out


def _read_tokenizer(folder: Path) -> None:
    from grpo_jax.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode("the cat 1 \u4e2d\U0010ffff")
    assert all(0 <= i < tokenizer.vocab_size for i in [*ids, *tokenizer.eos_ids])
    tokenizer.decode([ids, list(tokenizer.eos_ids)])[0].encode()
    json.dumps(tokenizer.special_ids())


def _sentencepiece_seeds(scratch: Path) -> list[Case]:
    import sentencepiece

    from grpo_jax.assets import synthetic

    (scratch / "text.txt").write_text("\n".join(synthetic.retention()), encoding="utf-8")
    out = []
    files = {"bpe": "tokenizer.model", "unigram": "sentencepiece.bpe.model"}
    classes = {"bpe": "LlamaTokenizer", "unigram": "XLMRobertaTokenizer"}
    for kind, size in (("bpe", 300), ("unigram", 60)):
        sentencepiece.SentencePieceTrainer.train(
            input=str(scratch / "text.txt"), model_prefix=str(scratch / "tokenizer"),
            vocab_size=size, model_type=kind, byte_fallback=kind == "bpe", hard_vocab_limit=False,
            minloglevel=2, user_defined_symbols=["<turn>"] if kind == "bpe" else [],
        )  # fmt: skip
        out.append({
            files[kind]: (scratch / "tokenizer.model").read_bytes(),
            "tokenizer_config.json": _json({
                "bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"},
                "add_bos_token": True, "tokenizer_class": classes[kind],
                "added_tokens_decoder": {"1": {"content": "<s>", "special": True}},
            }),
            "special_tokens_map.json": _json({"pad_token": "</s>"}),
        })  # fmt: skip
    return out


_INDEX = "model.safetensors.index.json"


def _weight_seeds(scratch: Path) -> list[Case]:
    from safetensors.numpy import save

    return [{"model.safetensors": save(_weight_tensors(), {"format": "pt"})}, _sharded()]


@functools.cache
def _sharded() -> Case:
    from safetensors.numpy import save

    tensors = _weight_tensors()
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[:2], "model-2.safetensors": names[2:]}
    files = {file: save({n: tensors[n] for n in held}) for file, held in shards.items()}
    weight_map = {name: file for file, held in shards.items() for name in held}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    return files | {_INDEX: _json(index)}


def _index_seeds(scratch: Path) -> list[Case]:
    return [{_INDEX: _sharded()[_INDEX]}]


def _read_index(folder: Path) -> None:
    """The shards are whole: only what names them is damaged."""
    store({name: data for name, data in _sharded().items() if name != _INDEX}, folder)
    _read_weights(folder)


def _weight_tensors() -> dict[str, np.ndarray]:
    return {
        "layers.0.w": np.ones((3, 2), np.float32), "layers.1.w": np.ones((3, 2), np.float16),
        "norm": np.ones(3, np.float32), "copy": np.ones(3, np.float32),
    }  # fmt: skip


def _read_weights(folder: Path) -> None:
    from grpo_jax.hub.tensors import Slot
    from grpo_jax.hub.weights import open_weights, weight_files

    table = {
        "layers.0.w": Slot(("layers", "w"), 0, True, (3, 2)),
        "layers.1.w": Slot(("layers", "w"), 1, True, (3, 2)),
        "norm": Slot(("norm",), None, False, (3,)),
    }
    files = weight_files(folder)
    assert all(file.resolve().is_relative_to(folder.resolve()) for file in files)
    params = open_weights(files, table, "float32", aliases={"copy": "norm"}).read()
    assert params["layers"]["w"].shape == (2, 2, 3)


def _gguf_seeds(scratch: Path) -> list[Case]:
    import gguf

    out = []
    draw = np.random.default_rng(0)
    for kind in ("gpt2", "llama"):
        if kind == "gpt2":
            tokens, types = ["<|end|>", *"hea ", "he"], [3] + [1] * 5
            extra: dict[str, Any] = {"pre": "smollm", "merges": ["h e"]}
        else:
            tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(4)), "h", "e", "he"]
            types = [2, 3, 3] + [6] * 4 + [1] * 3
            extra = {"scores": [0.0] * 7 + [-3.0, -2.0, -1.0], "bos_token_id": 1}
        writer = gguf.GGUFWriter(scratch / "model.gguf", "llama")
        sizes = {
            "block_count": 1, "context_length": 32, "embedding_length": 8,
            "feed_forward_length": 8, "attention.head_count": 2, "attention.head_count_kv": 1,
        }  # fmt: skip
        for key, number in sizes.items():
            writer.add_uint32(f"llama.{key}", number)
        writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        writer.add_string("tokenizer.ggml.model", kind)
        writer.add_array("tokenizer.ggml.tokens", tokens)
        writer.add_array("tokenizer.ggml.token_type", types)
        writer.add_uint32("tokenizer.ggml.eos_token_id", 0 if kind == "gpt2" else 2)
        for key, value in extra.items():
            adders: dict[type, Any] = {
                int: writer.add_uint32,
                str: writer.add_string,
                list: writer.add_array,
            }
            adders[type(value)](f"tokenizer.ggml.{key}", value)
        shapes: dict[str, tuple[int, ...]] = {
            "token_embd": (len(tokens), 8), "output_norm": (8,), "blk.0.attn_norm": (8,),
            "blk.0.ffn_norm": (8,), "blk.0.attn_q": (8, 8), "blk.0.attn_k": (4, 8),
            "blk.0.attn_v": (4, 8), "blk.0.attn_output": (8, 8), "blk.0.ffn_gate": (8, 8),
            "blk.0.ffn_up": (8, 8), "blk.0.ffn_down": (8, 8),
        }  # fmt: skip
        for name, shape in shapes.items():
            dtype = np.float16 if len(shape) == 2 else np.float32
            writer.add_tensor(f"{name}.weight", draw.normal(size=shape).astype(dtype))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        out.append(load(scratch, ("model.gguf",)))
    return out


def _read_gguf(folder: Path) -> None:
    from grpo_jax.hub.gguf import convert_gguf

    out = folder / "out"
    try:
        convert_gguf(folder / "model.gguf", out)
        json.loads((out / "config.json").read_text("utf-8"))
    finally:
        left = [p.name for p in folder.iterdir() if p.name not in ("model.gguf", "out")]
        shutil.rmtree(out, ignore_errors=True)
        assert not left, f"left behind: {left}"


@functools.cache
def _policy() -> Any:
    import tempfile

    from golden import make_hub

    from grpo_jax import hub

    with tempfile.TemporaryDirectory() as scratch:
        make_hub.write_decoder(Path(scratch) / "base", "llama")
        return hub.load_decoder(Path(scratch) / "base")


def _adapter_seeds(scratch: Path) -> list[Case]:
    from safetensors.numpy import save

    from grpo_jax.hub.adapter import _linears, _table

    policy = _policy()
    table = _table(policy, set(_linears(policy)), 2)
    tensors = {name: np.ones(slot.shape, np.float32) for name, slot in table.items()}
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "bias": "none",
        "lora_dropout": 0.1, "target_modules": sorted({path[-1] for path in _linears(policy)}),
        "init_lora_weights": True, "use_rslora": False, "base_model_name_or_path": "x/y",
    }  # fmt: skip
    weights = save(tensors, {"format": "pt"})
    expression = config | {"target_modules": ".*_proj", "use_rslora": True}
    return [
        {"adapter_config.json": _json(c), "adapter_model.safetensors": weights}
        for c in (config, expression, config | {"target_modules": "all-linear"})
    ]


def _read_adapter(folder: Path) -> None:
    from grpo_jax.hub.adapter import load_adapter

    adapter = load_adapter(_policy(), folder)
    assert 0 < adapter.rank < 2**31 and math.isfinite(adapter.alpha)
    assert 0 <= adapter.dropout < 1


def _task_seeds(scratch: Path) -> list[Case]:
    qas = [{"question": "who?", "answers": [{"text": "he", "answer_start": 0}]}]
    squad = {"data": [{"paragraphs": [{"context": "he did", "qas": qas}]}]}
    cmrc = [{"context_text": "he", "qas": [{"query_text": "who?", "answers": ["he"]}]}]
    choice = {"question": "2+2?", "choices": ["3", "4"], "answer": "B"}
    plain = {"context": "he did", "question": "who?", "answers": {"text": ["he"]}}
    return [
        {"squad.json": _json(squad)}, {"cmrc.json": _json(cmrc)},
        {"choices.jsonl": _json(choice) + b"\n" + _json(choice | {"answer": 1})},
        {"questions.jsonl": _json(plain) + b"\n" + _json(plain | {"answers": []})},
    ]  # fmt: skip


def _read_tasks(folder: Path) -> None:
    from grpo_jax.evals.task_files import read_choices, read_questions

    for file in folder.iterdir():
        for row in read_choices(file) if file.name == "choices.jsonl" else read_questions(file):
            json.dumps(row).encode()


@functools.cache
def _state() -> Any:
    import jax.numpy as jnp

    return {"w": jnp.arange(12.0).reshape(3, 4), "b": jnp.ones(3, jnp.bfloat16)}


def _checkpoint_seeds(scratch: Path) -> list[Case]:
    from grpo_jax.infra.checkpoint import Checkpoints

    with Checkpoints(scratch / "c", keep=1) as checkpoints:
        checkpoints.save(2, _state(), {"tau": 0.5}, score=0.5)
    return [load(scratch / "c")]


def _read_checkpoint(folder: Path) -> None:
    import jax

    from grpo_jax.infra.checkpoint import Checkpoints

    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _state()
    )
    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.best()
        restored, _ = checkpoints.restore(abstract)
    for got, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(_state()), strict=True):
        assert np.asarray(got).tobytes() == np.asarray(wanted).tobytes(), "damage went unnoticed"


READERS = {
    "jsonl": Reader(_row_seeds("jsonl"), _read_rows),
    "csv": Reader(_row_seeds("csv"), _read_rows),
    "tsv": Reader(_row_seeds("tsv"), _read_rows),
    "parquet": Reader(_row_seeds("parquet"), _read_rows),
    "decoder-config": Reader(_decoder_config_seeds, _read_decoder_config),
    "encoder-config": Reader(_encoder_config_seeds, _read_encoder_config),
    "modules": Reader(_module_seeds, _read_modules),
    "tokenizer": Reader(_tokenizer_seeds, _read_tokenizer),
    "sentencepiece": Reader(_sentencepiece_seeds, _read_tokenizer),
    "safetensors": Reader(_weight_seeds, _read_weights),
    "shard-index": Reader(_index_seeds, _read_index),
    "gguf": Reader(_gguf_seeds, _read_gguf),
    "adapter": Reader(_adapter_seeds, _read_adapter),
    "tasks": Reader(_task_seeds, _read_tasks),
    "checkpoint": Reader(_checkpoint_seeds, _read_checkpoint),
}
