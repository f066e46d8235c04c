"""Every family of sentence encoders: golden embeddings, full-size shapes, layouts and prompts."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import make_encoders
from golden.make_hub import write_json
from jax.sharding import AxisType
from safetensors.numpy import load_file, save_file

from grpo_jax import hub
from grpo_jax.config import Reward
from grpo_jax.hub.encoder import SentenceEncoder
from grpo_jax.hub.encoder_config import family_config
from grpo_jax.hub.names import encoder_table
from grpo_jax.hub.pooling import pool
from grpo_jax.models.encoder import position_ids, relative_buckets
from grpo_jax.rewards import Scorer
from grpo_jax.structs import Rollout, Row

GOLDEN = Path(__file__).parent / "golden"
TEXTS = make_encoders.TEXTS


@pytest.fixture(scope="session")
def folders_of_encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    for name in make_encoders.ENCODERS:
        make_encoders.write_encoder(root / name, name)
    return {name: root / name for name in make_encoders.ENCODERS}


@pytest.fixture(scope="session")
def encoders(folders_of_encoders: dict[str, Path]) -> dict[str, SentenceEncoder]:
    return {name: hub.load_encoder(path) for name, path in folders_of_encoders.items()}


@pytest.mark.parametrize("case", make_encoders.CASES)
def test_embeddings_are_those_of_sentence_transformers(
    case: str, encoders: dict[str, SentenceEncoder], folders_of_encoders: dict[str, Path]
) -> None:
    name, arguments = make_encoders.CASES[case]
    encoder = encoders[name]
    if arguments:
        encoder = hub.load_encoder(folders_of_encoders[name], **arguments)  # type: ignore[arg-type]
    vectors = encoder.embed(TEXTS)
    with np.load(GOLDEN / "encoders.npz") as golden:
        wanted = golden[case]
    # Unit vectors within 1e-5; others within 1e-5 of the largest number in them.
    np.testing.assert_allclose(vectors, wanted, rtol=0, atol=1e-5 * max(1, np.abs(wanted).max()))
    assert vectors.dtype == np.float32 and vectors.shape == (len(TEXTS), encoder.dim)


@pytest.mark.parametrize("name", make_encoders.PUBLISHED)
def test_full_size_shapes_have_the_published_counts(name: str, tmp_path: Path) -> None:
    defaults = {"hidden_act": "gelu", "max_position_embeddings": 512}
    write_json(tmp_path / "config.json", defaults | make_encoders.PUBLISHED[name])
    kind, config = family_config(tmp_path)
    counted = json.loads((GOLDEN / "encoders.json").read_text())[name]
    ours = sum(math.prod(slot.shape) for slot in encoder_table(kind, config).values())
    # The published count of the BERT family includes the pooler, which a sentence encoder drops.
    assert ours + counted["pooler"] == counted["total"]
    published = {"LaBSE": 470_926_848, "bge-m3": 567_754_752, "Qwen3-Embedding-0.6B": 595_776_512}
    assert counted["total"] == published.get(name, counted["total"])


def test_padding_in_a_text_has_no_position_of_its_own() -> None:
    ids = jnp.array([[0, 7, 1, 8, 2], [0, 2, 1, 1, 1]])
    np.testing.assert_array_equal(position_ids(ids, 1)[0], [2, 3, 1, 4, 5])
    np.testing.assert_array_equal(position_ids(ids, 1)[1, :2], [2, 3])
    np.testing.assert_array_equal(position_ids(ids, None)[1], np.arange(5))


def test_buckets_are_exact_near_by_and_shared_far_away() -> None:
    buckets = relative_buckets(200, 32)
    np.testing.assert_array_equal(buckets[9, :10], [8, 8, 7, 6, 5, 4, 3, 2, 1, 0])
    np.testing.assert_array_equal(buckets[0, :9] - 16, [-16, *range(1, 9)])
    # Powers of two are the edges of logarithmic buckets, where rounding could err.
    assert [int(buckets[n, 0]) for n in (15, 16, 31, 32, 63, 64, 127, 128, 199)] == [
        9, 10, 11, 12, 13, 14, 15, 15, 15,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "mode, wanted",
    [
        ("mean", [2.5, 25]),
        ("cls", [2, 20]),
        ("lasttoken", [3, 30]),
        ("max", [3, 30]),
        ("weightedmean", [(2 * 2 + 3 * 3) / 5, 26]),
        ("mean_sqrt_len_tokens", [5 / 2**0.5, 50 / 2**0.5]),
    ],
)
def test_pooling_without_the_prompt(mode: str, wanted: list[float]) -> None:
    hidden = jnp.array([[[1.0, 10], [2, 20], [3, 30], [99, 99]]] * 2)
    rows = pool(hidden, np.array([3, 1]), (mode, "mean"), skip=1)
    np.testing.assert_allclose(rows[0], [*wanted, 2.5, 25], rtol=1e-6)
    np.testing.assert_array_equal(rows[1], np.zeros(4))  # nothing but the prompt


def test_descriptions_name_family_modules_and_prompt(
    encoders: dict[str, SentenceEncoder], folders_of_encoders: dict[str, Path]
) -> None:
    lines = {name: encoder.describe() for name, encoder in encoders.items()}
    assert lines["xlmr"] == (
        "xlmr: XLM-RoBERTa, 3 layers x 36, cls pooling + normalize -> 36-d, at most 148 tokens"
    )
    assert "RoBERTa, " in lines["roberta"] and "mean_sqrt_len_tokens and max" in lines["roberta"]
    assert "MPNet" in lines["mpnet"] and "at most 40 tokens" in lines["roberta"]
    assert "qwen3 decoder" in lines["qwen3"] and "lasttoken pooling" in lines["qwen3"]
    assert lines["weighted"].endswith(", prompt 'query: the\\ntext:'")


def test_plain_folders_take_explicit_modules(
    tmp_path: Path, encoders: dict[str, SentenceEncoder], caplog: pytest.LogCaptureFixture
) -> None:
    make_encoders.write_encoder(tmp_path / "plain", "xlmr")
    (tmp_path / "plain" / "modules.json").unlink()
    plain = hub.load_encoder(tmp_path / "plain", pooling="cls", normalize=True)
    np.testing.assert_allclose(plain.embed(TEXTS), encoders["xlmr"].embed(TEXTS), atol=1e-6)
    with caplog.at_level(logging.INFO, logger="grpo_jax.hub.modules"):
        assert hub.load_encoder(tmp_path / "plain").head.pooling == ("mean",)
    assert "no modules.json; mean pooling" in caplog.text
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    write_json(tmp_path / "plain/config.json", config | {"architectures": ["XForCausalLM"]})
    assert hub.load_encoder(tmp_path / "plain").head.pooling == ("lasttoken",)
    with pytest.raises(ValueError, match="pooling: got 'first', wanted one of mean, cls"):
        hub.load_encoder(tmp_path / "plain", pooling="first")


def test_arguments_that_contradict_the_folder(folders_of_encoders: dict[str, Path]) -> None:
    def refused(name: str, message: str, **arguments: Any) -> None:
        with pytest.raises(ValueError, match=message):
            hub.load_encoder(folders_of_encoders[name], **arguments)

    refused("xlmr", "pooling: got 'mean', but .*modules.json says cls", pooling="mean")
    refused("xlmr", "normalize: got False, but .* has a Normalize", normalize=False)
    refused("weighted", "normalize: got True, but .* has no Normalize", normalize=True)
    refused("qwen3", r"prompt_name 'q' is not among the prompts \['query'", prompt_name="q")
    refused("qwen3", "wanted one of them", prompt_name="query", prompt="query: ")
    refused("qwen3", "with its prompt 'the cat' takes 4 to 150", prompt="the cat", max_length=3)


def test_an_encoder_without_modules_takes_no_arguments_for_them(tmp_path: Path) -> None:
    write_json(tmp_path / "use" / "config.json", {"model_type": "use-multilingual"})
    with pytest.raises(ValueError, match="use-multilingual takes no pooling"):
        hub.load_encoder(tmp_path / "use", prompt="query: ")


def test_what_would_compute_differently_is_refused(tmp_path: Path) -> None:
    make_encoders.write_encoder(tmp_path / "model", "qwen3")
    make_encoders.write_encoder(tmp_path / "xlmr", "xlmr")

    def refused(file: str, message: str, **changes: object) -> None:
        path = tmp_path / file
        before = path.read_text() if path.exists() else None
        write_json(path, (json.loads(before) if before else {}) | changes)
        with pytest.raises(ValueError, match=message):
            hub.load_encoder(tmp_path / file.split("/")[0])
        path.unlink() if before is None else path.write_text(before)

    refused("model/config.json", "is_causal = false", is_causal=False)
    refused(
        "xlmr/config.json", "'distilbert' is not supported.*bert, roberta", model_type="distilbert"
    )
    refused("xlmr/config.json", "pad_token_id: got 'x', wanted a token id", pad_token_id="x")
    settings = "model/sentence_bert_config.json"
    refused(settings, "transformer_task: 'text-generation'", transformer_task="text-generation")
    refused(settings, "model_args: .* is not supported", model_args={"dtype": "bfloat16"})
    refused(settings, "max_length: got 1; .* takes 2 to 150", max_seq_length=1)
    refused(
        "model/2_Normalize/config.json", "token_embeddings", module_input_name="token_embeddings"
    )
    refused("model/1_Pooling/config.json", r"\['pooling_mode_new'\] are not", pooling_mode_new=True)
    refused("model/1_Pooling/config.json", r"pooling \['median'\] is not", pooling_mode="median")


def test_both_generations_of_names_and_half_precision_load(
    tmp_path: Path, encoders: dict[str, SentenceEncoder]
) -> None:
    make_encoders.write_encoder(tmp_path / "instruct", "instruct")
    file = tmp_path / "instruct" / "model.safetensors"
    tensors = {}
    for name, value in load_file(file).items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        tensors["bert." + name.replace("LayerNorm.bias", "LayerNorm.beta")] = value
    tensors["cls.predictions.transform.LayerNorm.gamma"] = np.ones(36, np.float32)
    save_file(tensors, file)
    old = hub.load_encoder(tmp_path / "instruct")
    wanted = encoders["instruct"].embed(TEXTS[:3])
    np.testing.assert_allclose(old.embed(TEXTS[:3]), wanted, atol=1e-6)
    half = hub.load_encoder(tmp_path / "instruct", dtype="bfloat16")
    kernel = half.params["transformer"]["layers"]["output"]["dense"]["kernel"]
    assert kernel.dtype == jnp.bfloat16 and old.model.dtype == jnp.float32
    assert (half.embed(TEXTS[:3]) * wanted).sum(-1).min() > 0.99


def test_long_texts_get_small_batches(encoders: dict[str, SentenceEncoder]) -> None:
    encoder = dataclasses.replace(encoders["qwen3"], max_length=20_000, batch_size=4)
    lengths = np.array([3, 9_000, 700, 5, 4, 2, 10, 513])
    batches = [(chosen.tolist(), rows, width) for chosen, rows, width in encoder._batches(lengths)]
    assert batches == [
        ([1], 1, 10_240), ([2], 1, 768), ([7, 6], 2, 640), ([3, 4, 0, 5], 4, 16),
    ]  # fmt: skip


def test_few_shapes_are_ever_compiled(encoders: dict[str, SentenceEncoder]) -> None:
    encoder = dataclasses.replace(encoders["qwen3"], max_length=128, batch_size=64)
    draw = np.random.default_rng(0)
    shapes: set[tuple[int, int]] = set()
    for count in range(1, 300, 7):
        batches = list(encoder._batches(draw.integers(2, 65, count)))
        assert sorted(np.concatenate([chosen for chosen, *_ in batches])) == list(range(count))
        assert all(len(chosen) <= rows for chosen, rows, _ in batches)
        assert sum(rows for _, rows, _ in batches) < count + 8  # hardly a row is computed for none
        shapes |= {(rows, width) for _, rows, width in batches}
    widths = {16, 20, 24, 28, 32, 40, 48, 56, 64, 80}
    assert shapes <= {(rows, width) for rows in (8, 64) for width in widths}


# Token ids on the device


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy's folder, as far as its tokenizer goes: qwen3's, but nothing is put around texts."""
    folder = tmp_path_factory.mktemp("policy")
    make_encoders.write_tokenizer(folder, "qwen3")
    return folder


def completions(tokenizer: Any, rows: list[list[int]]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Texts, as a policy's tokenizer gives them, ids and lengths of rows of ids."""
    texts = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]
    ids = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return texts, ids, np.array([len(row) for row in rows])


@pytest.mark.parametrize("case", ["qwen3", "qwen3-query", "weighted"])
def test_token_ids_give_the_vectors_of_their_texts(
    case: str,
    encoders: dict[str, SentenceEncoder],
    folders_of_encoders: dict[str, Path],
    policy_folder: Path,
) -> None:
    name, arguments = make_encoders.CASES[case]
    encoder = encoders[name]
    if arguments:
        encoder = hub.load_encoder(folders_of_encoders[name], **arguments)  # type: ignore[arg-type]
    assert encoder.shares_tokenizer(policy_folder)
    tokenizer = encoder.tokenizer
    own = tokenizer(TEXTS, add_special_tokens=False)["input_ids"]
    vocab = tokenizer.get_vocab()
    spelt = [vocab[c] for c in "the"]  # never what the tokenizer would make of "the"
    odd = [spelt, own[0] + [vocab["\u0120"]], [vocab["<|im_start|>"]] + own[1], own[4] * 2]
    texts, ids, lengths = completions(tokenizer, [*own[:3], *own[5:6], *odd, own[0], []])
    same = encoder.same_tokens(texts, ids, lengths)
    assert same[:4].all() and not same[4:8].any() and same[8]
    vectors = encoder.embed_ids(jnp.asarray(ids), lengths)()
    through_text = encoder.embed(texts)
    np.testing.assert_allclose(vectors[same], through_text[same], rtol=0, atol=2e-6)
    assert np.abs(vectors[4] - through_text[4]).max() > 1e-3  # which is why texts are checked
    np.testing.assert_array_equal(vectors[0], vectors[8])


def test_a_rollout_scores_as_its_texts_do(encoders: dict[str, SentenceEncoder]) -> None:
    encoder = encoders["qwen3"]
    tokenizer = encoder.tokenizer
    rng = np.random.default_rng(0)
    words = tokenizer("the cat sat on the mat and dogs", add_special_tokens=False)["input_ids"]
    P, G, T = 8, 2, 12
    ids = np.where(
        rng.random((P, G, T)) < 0.9, rng.choice(words, (P, G, T)), rng.integers(0, 261, (P, G, T))
    ).astype(np.int32)
    lengths = rng.integers(1, T + 1, (P, G))
    ended = lengths < T
    mask = np.arange(T) < lengths[..., None]
    last = np.arange(T) == lengths[..., None] - 1
    eos = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = np.where(mask, np.where(last & ended[..., None], eos, ids), 0)
    flat = zip(ids.reshape(-1, T), mask.reshape(-1, T), strict=True)
    texts = [tokenizer.decode(row[m], skip_special_tokens=True).strip() for row, m in flat]
    scorer = Scorer(encoder, lambda texts: np.ones(len(texts), bool), Reward())
    rows = [Row("", text, text) for text in ("the cat sat", "dogs", "the mat", "cat") * 2]
    wanted = scorer.score(texts, rows, tau=0.0)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = jax.NamedSharding(mesh, jax.P("data"))
    rollout = Rollout(*jax.device_put((ids, mask, np.zeros((P, G, T), np.float32), ended), split))
    got = scorer.score(texts, rows, 0.0, rollout)
    np.testing.assert_allclose(got.similarity, wanted.similarity, rtol=0, atol=2e-6)
    np.testing.assert_allclose(got.total, wanted.total, rtol=0, atol=5e-6)
    counts = mask.sum(-1).reshape(-1) - ended.reshape(-1)
    same = encoder.same_tokens(texts, ids.reshape(-1, T), counts)
    assert 3 < same.sum() < 13  # both ways were taken
    assert np.ptp(np.asarray(got.similarity)) > 0.1


def test_other_vocabularies_and_rules_are_not_shared(
    encoders: dict[str, SentenceEncoder], policy_folder: Path, tmp_path: Path
) -> None:
    assert not encoders["roberta"].shares_tokenizer(policy_folder)
    rules = json.loads((policy_folder / "tokenizer.json").read_text())

    def shared(**changes: object) -> bool:
        write_json(tmp_path / "tokenizer.json", rules | changes)
        write_json(
            tmp_path / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}
        )
        return encoders["qwen3"].shares_tokenizer(tmp_path)

    assert shared(post_processor=None, added_tokens=rules["added_tokens"][:2])
    assert not shared(normalizer={"type": "NFKC"})
    assert not shared(pre_tokenizer=rules["pre_tokenizer"] | {"add_prefix_space": True})
    renamed = [token | {"content": f"<{token['id']}>"} for token in rules["added_tokens"]]
    assert not shared(added_tokens=renamed)
