"""Adapters in PEFT's form, and weights that go straight to where they are needed."""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from golden import make_adapter, make_hub
from safetensors.numpy import load_file, save_file

from grpo_jax import config, hub
from grpo_jax.config import Lora
from grpo_jax.hub import decoder as hub_decoder
from grpo_jax.hub import weights
from grpo_jax.hub.folder import split_hub_id
from grpo_jax.infra import mesh as mesh_lib
from grpo_jax.models import lora
from grpo_jax.stages import run as run_lib

GOLDEN = Path(__file__).parent / "golden"
FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(folders: dict[str, Path]) -> hub.Policy:
    return hub.load_decoder(folders["llama"])


@pytest.fixture(scope="module")
def saved(base: hub.Policy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "ours"
    hub.save_adapter(base, make_adapter.random_adapter(base), folder, card="# Card\n")
    return folder


@pytest.fixture(scope="module")
def listing() -> dict:
    return json.loads((GOLDEN / "adapter.json").read_text(encoding="utf-8"))


def copy_of(saved: Path, folder: Path, **changes: object) -> Path:
    """The saved adapter with another adapter_config.json; a change to ... removes the field."""
    folder.mkdir()
    found = json.loads((saved / "adapter_config.json").read_text(encoding="utf-8")) | changes
    found = {name: value for name, value in found.items() if value is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(found), encoding="utf-8")
    (folder / FILE).write_bytes((saved / FILE).read_bytes())
    return folder


def logits(policy: hub.Policy, base: hub.Policy, adapter: hub.Adapter) -> np.ndarray:
    """Of the merged model, with the base's compiled function."""
    params = jax.tree.map(np.asarray, make_adapter.merged(policy, adapter).params)
    ids = make_hub.decoder_ids()
    return np.asarray(base._forward(params, ids, np.full(len(ids), ids.shape[1], np.int32)))


# Adapters


def test_what_is_saved_is_what_peft_would_save(saved: Path, listing: dict) -> None:
    found = {name: list(tensor.shape) for name, tensor in load_file(saved / FILE).items()}
    assert found == listing["shapes"]
    ours = json.loads((saved / "adapter_config.json").read_text(encoding="utf-8"))
    theirs = dict(listing["config"])
    last = {name.split(".")[-1] for name in theirs.pop("target_modules")}  # it lists whole paths
    assert set(ours.pop("target_modules")) == last
    assert ours.pop("base_model_name_or_path").startswith("/")
    assert ours.pop("inference_mode") is True
    assert {name: theirs[name] for name in ours} == ours  # the rest are PEFT's defaults
    assert (saved / "README.md").read_text() == "# Card\n"
    names = {file.name for file in saved.iterdir()}
    assert names == {
        "README.md", "adapter_config.json", FILE, "generation_config.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip


@pytest.mark.parametrize("config", ["ours", "peft's", "all-linear", "expression"])
def test_logits_are_those_of_peft(
    config: str, base: hub.Policy, saved: Path, listing: dict, tmp_path: Path
) -> None:
    targets = {
        "ours": {},
        "peft's": listing["config"],
        "all-linear": {"target_modules": "all-linear"},
        "expression": {"target_modules": r".*\.(self_attn|mlp)\.\w+_proj"},
    }[config]
    found = hub.load_adapter(base, copy_of(saved, tmp_path / "copy", **targets))
    with np.load(GOLDEN / "adapter.npz") as golden:
        np.testing.assert_allclose(logits(base, base, found), golden["ours"], rtol=0, atol=1e-4)


def test_an_adapter_that_peft_wrote(
    base: hub.Policy, saved: Path, listing: dict, tmp_path: Path
) -> None:
    """rsLoRA's scale, and target_modules with a part of a path."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    with np.load(GOLDEN / "adapter.npz") as golden:
        tensors = {k.removeprefix("tensor/"): golden[k] for k in golden if k.startswith("tensor/")}
        save_file(tensors, folder / FILE)
        (folder / "adapter_config.json").write_text(json.dumps(listing["theirs"]))
        found = hub.load_adapter(base, folder)
        assert found.rank == 4 and found.alpha == 6 * 4**0.5
        assert found.targets == ("down_proj", "q_proj", "v_proj")
        np.testing.assert_allclose(logits(base, base, found), golden["theirs"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_import_and_export_of_an_adapter_are_the_identity(
    dtype: str, base: hub.Policy, saved: Path, tmp_path: Path
) -> None:
    kind = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[dtype]
    first = copy_of(saved, tmp_path / "first")
    save_file({k: v.astype(kind) for k, v in load_file(first / FILE).items()}, first / FILE)
    found = hub.load_adapter(base, first, param_dtype=dtype)
    hub.save_adapter(base, found, tmp_path / "second")
    ours, theirs = load_file(tmp_path / "second" / FILE), load_file(first / FILE)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype == kind
        assert ours[name].tobytes() == tensor.tobytes()
    again = hub.load_adapter(base, tmp_path / "second", param_dtype=dtype)
    assert (again.rank, again.alpha, again.dropout) == (found.rank, found.alpha, found.dropout)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type: got 'IA3', wanted 'LORA'"),
        ({"task_type": "SEQ_CLS"}, "task_type: got 'SEQ_CLS'"),
        ({"bias": "all"}, "bias: got 'all'"),
        ({"r": 0}, "r: got 0, wanted a positive integer"),
        ({"r": 4}, r"misshapen: base_model.*lora_A.weight is \[3, 32\].* for \[4, 32\]"),
        ({"lora_alpha": "8"}, "lora_alpha: got '8'"),
        ({"use_dora": True}, "use_dora: True is not implemented; merge the adapter with peft"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: got 'pissa'"),
        ({"target_modules": ["q_proj"]}, "unknown: .*k_proj.lora_A.weight"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules .*wanted linear layers"),
        ({"target_modules": ...}, "target_modules None; wanted linear layers of this model"),
        ({"target_modules": r".*layers\.0.*q_proj"}, "chooses q_proj in some layers only"),
    ],
)
def test_adapters_that_compute_differently_are_refused(
    change: dict, message: str, base: hub.Policy, saved: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        hub.load_adapter(base, copy_of(saved, tmp_path / "changed", **change))


def test_an_adapter_of_another_model_or_none(
    base: hub.Policy, saved: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    other = hub.load_decoder(folders["qwen3"])  # its heads are wider
    with pytest.raises(ValueError, match="misshapen: .*q_proj.lora_B.weight is"):
        hub.load_adapter(other, saved)
    with pytest.raises(ValueError, match=r"k_proj.lora_B.weight: parameters \(16, 3\)"):
        hub.save_adapter(other, make_adapter.random_adapter(base), tmp_path / "out")
    strange = dataclasses.replace(make_adapter.random_adapter(base), params={"layers": {}})
    strange.params["layers"]["c_attn"] = {"lora_a": np.zeros((2, 32, 3)), "lora_b": 0}
    with pytest.raises(ValueError, match="the adapter has .*c_attn.*the model only"):
        hub.save_adapter(base, strange, tmp_path / "out")
    pickled = copy_of(saved, tmp_path / "pickled")
    (pickled / FILE).rename(pickled / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="pickled adapters .* are never read"):
        hub.load_adapter(base, pickled)
    with pytest.raises(FileNotFoundError, match="adapter_config.json: missing"):
        hub.load_adapter(base, folders["llama"])
    assert not (tmp_path / "out").exists()


def test_adapters_of_a_chain_are_one_of_the_sum_of_their_ranks(base: hub.Policy) -> None:
    first, second = (make_adapter.random_adapter(base, rank, 2.0 * rank) for rank in (3, 2))
    joined = lora.concatenate([first.params, second.params])
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(joined))
    one = make_adapter.merged(base, hub.Adapter(joined, 5, 10.0)).params
    two = make_adapter.merged(make_adapter.merged(base, first), second).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, two)


def test_starting_from_an_adapter(base: hub.Policy, saved: Path) -> None:
    rank, alpha = make_adapter.RANK, make_adapter.ALPHA
    found = run_lib._open_adapter(Lora(rank, alpha, path=str(saved)), base)
    jax.tree.map(np.testing.assert_array_equal, found, make_adapter.random_adapter(base).params)
    assert run_lib._open_adapter(Lora(rank), base) is None
    wrong = Lora(8, 16.0, targets=("q_proj",), path=str(saved))
    with pytest.raises(ValueError) as error:
        run_lib._open_adapter(wrong, base)
    for text in (
        "rank: got 8, the adapter has 3",
        "alpha: got 16.0, the adapter has 7.0",
        "targets",
    ):
        assert f"model.lora.{text}" in str(error.value)


# Whole models: dtypes, what is carried along


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_models_come_out_bit_for_bit(
    dtype: str, llama_folder: Path, tmp_path: Path
) -> None:
    kind = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[dtype]
    file = llama_folder / "model.safetensors"
    stored = {name: tensor.astype(kind) for name, tensor in load_file(file).items()}
    save_file(stored, file)
    for i, param_dtype in enumerate((dtype, "float32")):
        policy = hub.load_decoder(llama_folder, param_dtype=param_dtype)
        hub.save_decoder(policy, tmp_path / str(i), dtype=None if i == 0 else dtype)
        again = load_file(tmp_path / str(i) / "model.safetensors")
        assert {k: v.tobytes() for k, v in again.items()} == {
            k: v.tobytes() for k, v in stored.items()
        }
        assert json.loads((tmp_path / str(i) / "config.json").read_text())["dtype"] == dtype
    with pytest.raises(ValueError, match="activations are float32 or bfloat16"):
        hub.load_decoder(llama_folder, dtype="float16")


def test_float16_export_refuses_what_it_cannot_hold(base: hub.Policy, tmp_path: Path) -> None:
    params = jax.tree.map(np.array, base.params)
    params["norm"]["scale"][3] = 1e5
    with pytest.raises(ValueError, match=r"model.norm.weight: numbers up to 1e\+05, float16 ends"):
        hub.save_decoder(
            dataclasses.replace(base, params=params), tmp_path / "out", dtype="float16"
        )


def test_the_folders_own_settings_are_carried_along(llama_folder: Path, tmp_path: Path) -> None:
    given = {"temperature": 0.6, "top_p": 0.95, "do_sample": True, "max_length": 99}
    (llama_folder / "generation_config.json").write_text(json.dumps(given))
    policy = hub.load_decoder(llama_folder)
    hub.save_decoder(policy, llama_folder)  # onto itself
    hub.save_decoder(policy, tmp_path / "out")
    for folder in (llama_folder, tmp_path / "out"):
        found = json.loads((folder / "generation_config.json").read_text())
        assert found == given | policy.tokenizer.special_ids()
        assert "torch_dtype" not in json.loads((folder / "config.json").read_text())


def test_a_model_with_images_gives_its_language_model(llama_folder: Path) -> None:
    file = llama_folder / "model.safetensors"
    tensors = load_file(file)
    table = hub_decoder.decoder_table(hub.open_decoder(llama_folder).config)
    for outer in ("language_model.model.", "model.language_model."):
        renamed = {
            k.replace("model.", outer, 1) if k.startswith("model.") else f"language_model.{k}": v
            for k, v in tensors.items()
        }
        extra = {"vision_tower.a.weight": np.zeros(2), "model.multi_modal_projector.b": np.zeros(2)}
        save_file(renamed | extra, file)
        found = weights.open_weights([file], table, "float32", rename=hub_decoder._language_model)
        assert found.unused == tuple(sorted(extra))
        norm = found.read()["norm"]["scale"]
        np.testing.assert_array_equal(norm, tensors["model.norm.weight"])
    save_file(tensors | {"audio_tower.weight": np.zeros(2)}, file)
    with pytest.raises(ValueError, match="unknown: audio_tower.weight"):
        weights.open_weights([file], table, "float32", rename=hub_decoder._language_model)


# Reading to where it is needed


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 5 MB in several shards of mixed dtypes, without a folder around them."""
    folder = tmp_path_factory.mktemp("wide")
    make_hub.write_decoder(folder, "llama")
    found = json.loads((folder / "config.json").read_text())
    found |= {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 6}
    (folder / "config.json").write_text(json.dumps(found))
    (folder / "model.safetensors").unlink()
    table = hub_decoder.decoder_table(hub_decoder.decoder_config(folder))
    draw = np.random.default_rng(0)
    tensors = {k: draw.normal(size=s.shape).astype(np.float32) for k, s in table.items()}
    for i, name in enumerate(tensors):
        if i % 3 == 1:
            tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
    hub_decoder.write_safetensors(folder, tensors, shard_bytes=1_000_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    return folder


def placement(policy: hub.Policy, **sizes: int) -> weights.Placement:
    count = int(np.prod(list(sizes.values())))
    mesh = mesh_lib.make_mesh(
        config.Mesh(**{"data": 1, "fsdp": 1, "tensor": 1} | sizes), jax.devices()[:count]
    )
    shardings = mesh_lib.param_shardings(mesh, policy.params)
    return lambda path, shape: functools.reduce(operator.getitem, path, shardings)


@pytest.mark.parametrize("sizes", [{"data": 1}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
@pytest.mark.parametrize("whole", [1 << 26, 200_000])
def test_parameters_are_read_straight_to_their_devices(
    sizes: dict, whole: int, wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_whole_bytes", lambda sizes: whole)
    policy = hub.open_decoder(wide, param_dtype="bfloat16")
    pieces: list[int] = []
    part = weights.Weights._part

    def counting(*args: object) -> np.ndarray:
        out = part(*args)  # type: ignore[arg-type]
        pieces.append(out.nbytes)
        return out

    wanted = policy.weights.read()
    jax.tree.map(lambda x, s: (x.shape, x.dtype) == (s.shape, s.dtype), wanted, policy.params)
    monkeypatch.setattr(weights.Weights, "_part", counting)
    where = placement(policy, **sizes)
    found = policy.weights.read(where)
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        keys = tuple(key.key for key in path)
        assert leaf.sharding.is_equivalent_to(where(keys, leaf.shape), leaf.ndim)
        np.testing.assert_array_equal(leaf, functools.reduce(operator.getitem, keys, wanted))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(wanted))
    assert total <= sum(pieces) <= 1.3 * total  # once each; last pieces overlap
    assert max(pieces) <= min(whole, total / 4)


def test_no_more_than_a_piece_is_held_beside_what_is_placed(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_whole_bytes", lambda sizes: 200_000)
    policy = hub.open_decoder(wide)
    where = placement(policy, data=1)
    policy.weights.read(where)  # everything is compiled and imported
    tracemalloc.start()
    found = policy.weights.read(where)  # jax's own memory is not counted
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(found))
    assert peak < 600_000 < total / 5


def test_nothing_aliases_the_files_or_other_parameters(wide: Path) -> None:
    policy = hub.open_decoder(wide)
    where = placement(policy, data=2)  # two copies of everything
    params = policy.weights.read(where)
    wanted = policy.weights.read()
    double = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, tree), donate_argnums=0)
    doubled = double(params)
    for again in (policy.weights.read(where), wanted):
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, 2 * y), doubled, again)
    for leaf in jax.tree.leaves(doubled):
        one, two = leaf.addressable_shards
        np.testing.assert_array_equal(one.data, two.data)


def test_opening_reads_no_numbers_and_misses_nothing(wide: Path, tmp_path: Path) -> None:
    policy = hub.open_decoder(wide)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(policy.params))
    with pytest.raises(ValueError, match="opened without its weights; use load_decoder"):
        policy.logits(jnp.zeros((1, 2), jnp.int32))
    for file in wide.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    opened = hub.open_decoder(tmp_path)
    shard = sorted(tmp_path.glob("model-*"))[1]
    shard.write_bytes(shard.read_bytes() + b"x")
    with pytest.raises(ValueError, match=f"{shard.name}: changed since it was opened"):
        opened.weights.read()
    with pytest.raises(ValueError, match=f"{shard.name}: truncated or damaged"):
        hub.open_decoder(tmp_path)


def test_an_index_that_does_not_fit_its_shards(wide: Path, tmp_path: Path) -> None:
    for file in wide.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    index = tmp_path / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    files = found["weight_map"]
    files["model.norm.weight"], files["model.norm.bias"] = (
        files["model.embed_tokens.weight"],
        files["model.norm.weight"],
    )
    index.write_text(json.dumps(found))
    with pytest.raises(ValueError) as error:
        hub.open_decoder(tmp_path)
    assert "holds model.norm.weight, but model.safetensors.index.json does not" in str(error.value)
    assert "says that model-00001-of" in str(error.value) and "norm.bias" in str(error.value)
    index.write_text(json.dumps({"metadata": {}}))
    with pytest.raises(ValueError, match="no weight_map in it"):
        hub.open_decoder(tmp_path)


# Names, imports


def test_hub_ids() -> None:
    assert split_hub_id("Qwen/Qwen3-4B") == ("Qwen/Qwen3-4B", None)
    assert split_hub_id("Qwen/Qwen3-4B@refs/pr/1") == ("Qwen/Qwen3-4B", "refs/pr/1")
    for path in ("folder", "a/b/c", "a/b@", "/a/b", "a b/c"):
        assert split_hub_id(path) == ("", None)


def test_a_hub_id_that_cannot_be_reached_says_how_to_pass_a_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import huggingface_hub

    asked = []

    def offline(name: str, revision: str | None, **_: object) -> str:
        asked.append((name, revision))
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match="no network.*--local-dir FOLDER.*give FOLDER"):
        hub.load_decoder("Some/Model@v1")
    assert asked == [("Some/Model", "v1")]


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("grpo_jax.config, grpo_jax.main", "flax optax orbax"),
        ("grpo_jax.hub", "optax orbax huggingface_hub safetensors"),
        ("grpo_jax.stages.run, grpo_jax.stages.sft", ""),
    ],
)
def test_importing_brings_no_more_than_it_needs(modules: str, heavy: str) -> None:
    heavy += " transformers datasets torch matplotlib sentencepiece pyarrow pandas tensorboardX"
    code = f"import sys, {modules}; print(*sorted(set('{heavy}'.split()) & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not out.stdout.split()
