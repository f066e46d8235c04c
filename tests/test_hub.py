"""Model folders in and out: golden logits, export, generation, the real model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from golden import make_hub
from safetensors.numpy import load_file, save_file

from grpo_jax import hub
from grpo_jax.hub import decoder as hub_decoder
from grpo_jax.hub.decoder_config import decoder_config
from grpo_jax.hub.folder import atomic_folder
from grpo_jax.hub.names import decoder_table
from grpo_jax.hub.writing import unstack, write_safetensors

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def llama(folders: dict[str, Path]) -> hub.Policy:
    return hub.load_decoder(folders["llama"])


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    """A private copy to damage."""
    make_hub.write_decoder(tmp_path / "model", "llama")
    return tmp_path / "model"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_same_params(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for key in a:
        if isinstance(a[key], dict):
            assert_same_params(a[key], b[key])
        else:
            assert a[key].dtype == b[key].dtype
            np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("kind", make_hub.DECODERS)
def test_logits_are_those_of_transformers(kind: str, folders: dict[str, Path]) -> None:
    before = snapshot(folders[kind])
    policy = hub.load_decoder(folders[kind])
    logits = np.asarray(policy.logits(make_hub.decoder_ids()))
    assert logits.dtype == np.float32
    with np.load(GOLDEN / "hub.npz") as golden:
        np.testing.assert_allclose(logits, golden[kind], rtol=0, atol=1e-4)
    assert snapshot(folders[kind]) == before  # loading writes nothing


def test_tables_name_every_tensor_of_transformers(folders: dict[str, Path]) -> None:
    for kind, folder in folders.items():
        table = decoder_table(decoder_config(folder))
        assert {k: s.shape for k, s in table.items()} == make_hub.decoder_shapes(kind)


@pytest.mark.parametrize("kind", make_hub.DECODERS)
def test_export_and_import_are_the_identity(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    policy = hub.load_decoder(folders[kind])
    hub.save_decoder(policy, tmp_path / "out", card="# Card\n")
    again = hub.load_decoder(tmp_path / "out")
    assert again.config == policy.config
    assert_same_params(again.params, policy.params)
    assert (tmp_path / "out/README.md").read_text() == "# Card\n"
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / "out", folders[kind]))
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "README.md",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["AnyForCausalLM"]  # as it came
    assert config["model_type"] == kind and config["dtype"] == "float32"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]


def test_bfloat16_export_rounds_once(llama: hub.Policy, tmp_path: Path) -> None:
    hub.save_decoder(llama, tmp_path / "a", dtype="bfloat16")
    half = hub.load_decoder(tmp_path / "a", param_dtype="bfloat16")
    assert json.loads((tmp_path / "a/config.json").read_text())["dtype"] == "bfloat16"
    hub.save_decoder(half, tmp_path / "b")
    assert_same_params(hub.load_decoder(tmp_path / "b", param_dtype="bfloat16").params, half.params)


def test_export_takes_jax_arrays(llama: hub.Policy, tmp_path: Path) -> None:
    import jax.numpy as jnp
    from jax import tree

    trained = dataclasses.replace(
        llama, params=tree.map(lambda x: jnp.asarray(x) + 1, llama.params)
    )
    hub.save_decoder(trained, tmp_path / "out")
    loaded = hub.load_decoder(tmp_path / "out").params
    assert_same_params(loaded, tree.map(lambda x: x + 1, llama.params))


def test_shards(llama: hub.Policy, llama_folder: Path) -> None:
    tensors = unstack(llama.params, decoder_table(llama.config))
    (llama_folder / "model.safetensors").unlink()
    write_safetensors(llama_folder, tensors, shard_bytes=40_000)
    shards = sorted(llama_folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    index = json.loads((llama_folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)
    assert_same_params(hub.load_decoder(llama_folder).params, llama.params)
    save_file({**load_file(shards[0]), **load_file(shards[1])}, shards[1])
    with pytest.raises(ValueError, match="duplicate: "):
        hub.load_decoder(llama_folder)
    shards[0].unlink()
    with pytest.raises(FileNotFoundError, match=f"shards missing: .*{shards[0].name}"):
        hub.load_decoder(llama_folder)


def test_failed_export_leaves_what_was_there(
    llama: hub.Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    hub.save_decoder(llama, out)
    before = snapshot(out)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub_decoder, "write_safetensors", full)
    with pytest.raises(OSError, match="out.* could not be written .*No space left"):
        hub.save_decoder(llama, out, card="new")
    assert snapshot(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    monkeypatch.undo()
    hub.save_decoder(llama, out, card="new")
    assert (out / "README.md").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_export_onto_itself_keeps_the_tokenizer(llama_folder: Path) -> None:
    policy = hub.load_decoder(llama_folder)
    hub.save_decoder(policy, llama_folder)
    assert hub.load_decoder(llama_folder).tokenizer.encode("a") == policy.tokenizer.encode("a")


def test_export_spares_other_folders(llama: hub.Policy, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not a model folder"):
        hub.save_decoder(llama, tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_greedy_generation_follows_the_logits(llama: hub.Policy) -> None:
    prompts = ["tumsa", "a longer prompt"]
    texts = llama.generate(prompts, max_new_tokens=6, chat=False)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = list(prompt.encode())
        for _ in range(6):
            padded = np.asarray([ids + [0] * (24 - len(ids))])  # one shape, one compilation
            ids.append(int(np.argmax(np.asarray(llama.logits(padded))[0, len(ids) - 1])))
            if ids[-1] in llama.tokenizer.eos_ids:
                break
        assert text == llama.tokenizer.decode([ids[len(prompt) :]])[0]


def test_generation_seeds(llama: hub.Policy) -> None:
    def generate(seed: int | None) -> list[str]:
        return llama.generate(["a", "b"], 12, temperature=1.0, seed=seed, chat=False)

    assert generate(1) == generate(1)
    assert generate(1) != generate(2)
    assert generate(None) != generate(None)


def test_generation_refuses_what_does_not_fit(llama: hub.Policy) -> None:
    assert llama.generate([], chat=False) == []
    with pytest.raises(ValueError, match=r"prompts\[1\]: 200 tokens; wanted 1 to 64"):
        llama.generate(["a", "a" * 200], chat=False)
    with pytest.raises(ValueError, match="ids: got 0 to 259, wanted 0 to 258"):
        llama.logits(np.asarray([[0, 259]]))


@pytest.mark.assets
def test_smollm2_is_what_torch_says() -> None:
    golden = json.loads((GOLDEN / "hub_assets.json").read_text())
    policy = hub.load_decoder("asset:smollm2-135m-instruct")
    assert policy.tokenizer.encode(make_hub.PASSAGE) == golden["ids"]
    ids = np.asarray([golden["ids"]])
    logits = np.asarray(policy.logits(ids))[0]
    top = np.take_along_axis(logits, np.asarray(golden["top"]), axis=-1)
    np.testing.assert_allclose(top, golden["logits"], rtol=0, atol=1e-4)
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    perplexity = np.exp(-logps[np.arange(len(ids[0]) - 1), ids[0, 1:]].mean())
    assert abs(perplexity - golden["perplexity"]) < 1e-3 and perplexity < 10
    assert policy.tokenizer.eos_ids == (2,)
    prompt = policy.tokenizer.encode("The capital of France is")
    padded = np.asarray([prompt + [0] * (len(ids[0]) - len(prompt))])  # the shape is compiled
    answer = int(np.argmax(np.asarray(policy.logits(padded))[0, len(prompt) - 1]))
    assert policy.tokenizer.decode([[answer]]) == ["Paris"]


def test_what_a_kill_left_of_an_export_is_cleared_away(tmp_path: Path) -> None:
    """A half-written folder goes; one that was moved aside for the new one comes back."""
    target = tmp_path / "model"
    (tmp_path / ".model.tmp").mkdir()
    old = tmp_path / ".model.old"
    old.mkdir()
    (old / "config.json").write_text("{}")
    with pytest.raises(RuntimeError), atomic_folder(target) as folder:
        assert (target / "config.json").exists() and not old.exists()
        raise RuntimeError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    assert not any(folder.parent.glob(".*"))
