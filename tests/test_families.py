"""Every decoder family and rope kind computes what transformers computes (golden/families.py)."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import families
from safetensors.numpy import load_file, save_file

from grpo_jax import hub
from grpo_jax.config import Sampling
from grpo_jax.hub.decoder_config import decoder_config, export_json
from grpo_jax.hub.names import decoder_table
from grpo_jax.models.decoder import logits
from grpo_jax.rollout.sampler import build_sampler

GOLDEN = Path(__file__).parent / "golden/families.npz"
# Those that differ from another case only in constants, which the forward pass shows, are not
# sampled: each sampler takes seconds to compile.
SAMPLED = [name for name in families.CASES if name not in ("llama3", "linear", "gemma3")]
Case = tuple[Path, hub.Policy]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Name -> folder and loaded policy of a family."""

    @functools.cache
    def case(name: str) -> Case:
        folder = tmp_path_factory.mktemp(name) / "model"
        families.write_family(folder, name)
        return folder, hub.load_decoder(folder)

    return case


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as stored:
        names = [key for key in stored.files if key.startswith(f"{name}/")]
        return {key.removeprefix(f"{name}/"): stored[key] for key in names}


@pytest.mark.parametrize("name", families.CASES)
def test_logits_and_gradients(name: str, cases: Callable[[str], Case]) -> None:
    """A batch padded on the right; gradients of the mean log-prob, relative to the largest."""
    _, policy = cases(name)
    rows = families.family_rows()
    ids = np.zeros((len(rows), max(families.LENGTHS)), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    lengths = np.asarray(families.LENGTHS, np.int32)
    inside = np.arange(ids.shape[1]) < lengths[:, None]

    def mean_logp(params: dict) -> tuple[jax.Array, jax.Array]:
        hidden = policy.model.apply({"params": params}, ids, lengths)
        scores = logits(policy.config, params, hidden)
        logps = jax.nn.log_softmax(scores)[:, :-1]
        chosen = jnp.take_along_axis(logps, ids[:, 1:, None], axis=-1)[..., 0]
        return jnp.sum(jnp.where(inside[:, 1:], chosen, 0)) / inside[:, 1:].sum(), scores

    (_, scores), gradients = jax.jit(jax.value_and_grad(mean_logp, has_aux=True))(policy.params)
    wanted = golden(name)
    ours = np.asarray(scores)[inside][:, families.COLUMNS]
    np.testing.assert_allclose(ours, wanted["logits"], rtol=0, atol=1e-4)
    table = decoder_table(policy.config)
    parts = families.gradient_parts(name)
    assert len(parts) >= 6
    for key, part in parts.items():
        gradient = gradients
        for word in table[key].path:
            gradient = gradient[word]
        gradient = gradient if table[key].layer is None else gradient[table[key].layer]
        gradient = np.asarray(gradient.T if table[key].transpose else gradient)[part]
        theirs = wanted[f"gradient/{key}"]
        scale = np.abs(theirs).max()
        assert scale > 1e-3, key
        np.testing.assert_allclose(gradient, theirs, rtol=0, atol=1e-4 * scale, err_msg=key)


@pytest.mark.parametrize("name", SAMPLED)
def test_greedy_decoding(name: str, cases: Callable[[str], Case]) -> None:
    """64 tokens, from prompts of different lengths in one batch padded on the right."""
    _, policy = cases(name)
    wanted = golden(name)
    sample = build_sampler(policy.model, Sampling(temperature=0.0), families.NEW_TOKENS, ())
    rollout = sample(
        {"params": policy.params},
        wanted["prompts"].astype(np.int32),
        np.asarray(families.PROMPTS, np.int32),
        jax.random.key(0),
        num_generations=1,
    )
    np.testing.assert_array_equal(np.asarray(rollout.ids)[:, 0], wanted["completions"])


@pytest.mark.parametrize("name", families.CASES)
def test_export_and_import_are_the_identity(
    name: str, cases: Callable[[str], Case], tmp_path: Path
) -> None:
    _, policy = cases(name)
    hub.save_decoder(policy, tmp_path / "out")
    again = hub.load_decoder(tmp_path / "out")
    assert again.config == policy.config
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, policy.params))
    ours, theirs = load_file(tmp_path / "out/model.safetensors"), families.family_tensors(name)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        np.testing.assert_array_equal(ours[key], tensor)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == families.CASES[name]["model_type"]


@pytest.mark.parametrize("name", families.CASES)
def test_tables_name_every_tensor(name: str, cases: Callable[[str], Case]) -> None:
    _, policy = cases(name)
    shapes = {key: slot.shape for key, slot in decoder_table(policy.config).items()}
    assert shapes == families.family_shapes(name)


@pytest.mark.parametrize("name", families.CASES)
def test_exported_configs_hold_both_forms_of_the_rope(name: str, tmp_path: Path) -> None:
    """What is written reads the same; so does each of its two forms alone, once more completed."""
    families.write_family(tmp_path, name)
    config, written = decoder_config(tmp_path), export_json(tmp_path)
    assert written["rope_theta"] == config.rope.theta
    original = json.loads((tmp_path / "config.json").read_text())
    original = original.get("text_config", original)
    rope_fields = ("rope_theta", "rope_local_base_freq", "rope_scaling", "rope_parameters")
    for key, value in original.items():
        assert key in rope_fields or written[key] == value, key
    for absent in [(), ("rope_parameters",), rope_fields[:3]]:
        alone = {key: value for key, value in written.items() if key not in absent}
        (tmp_path / "config.json").write_text(json.dumps(alone))
        assert decoder_config(tmp_path) == config
        again = export_json(tmp_path)
        assert again["rope_parameters"] == written["rope_parameters"]
        assert bool(again.get("rope_scaling")) == bool(written.get("rope_scaling"))


def test_the_newer_layout_of_models_with_images(
    cases: Callable[[str], Case], tmp_path: Path
) -> None:
    """The language model's tensors are model.language_model.*; strangers are still refused."""
    name = "gemma3"
    folder, policy = cases(name)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tensors = {
        key.replace("model.", "model.language_model."): value
        for key, value in families.family_tensors(name).items()
    }
    tensors["model.vision_tower.post_layernorm.bias"] = np.zeros(2, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    again = hub.load_decoder(tmp_path).params
    assert jax.tree.all(jax.tree.map(np.array_equal, again, policy.params))
    save_file(tensors | {"audio_tower.bias": np.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="unknown: audio_tower.bias"):
        hub.load_decoder(tmp_path)
