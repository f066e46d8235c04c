"""Eight virtual CPU devices, set up before jax is imported, and the tiny decoder of many tests."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # a stale entry must not decide a test
# Tests compile far more than they compute, so XLA is told to optimise less: a third off the time.
FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)
os.environ["XLA_FLAGS"] = " ".join((*FLAGS, os.environ.get("XLA_FLAGS", "")))  # later ones win
os.environ["PJRT_NPROC"] = "16"  # fewer threads than devices wait for each other for ever

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from golden import make_hub  # noqa: E402
from hypothesis import settings  # noqa: E402

from grpo_jax.models.decoder import Decoder, DecoderConfig  # noqa: E402

settings.register_profile("tiny", max_examples=25, deadline=None, derandomize=True, database=None)
settings.load_profile("tiny")


@pytest.fixture(scope="session")
def tiny() -> Decoder:
    """Two layers with grouped queries, biases, normed heads and an untied output matrix."""
    return Decoder(
        DecoderConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=48,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            qkv_bias=True,
            qk_norm=True,
        )
    )


@pytest.fixture(scope="session")
def tiny_params(tiny: Decoder) -> dict:
    """Parameters large enough for errors to show: peaked attention, spread logits, odd norms."""
    ids, lengths = jnp.zeros((1, 2), jnp.int32), jnp.ones((1,), jnp.int32)
    shapes = jax.eval_shape(tiny.init, jax.random.key(0), ids, lengths)["params"]
    rng = np.random.default_rng(0)

    def leaf(path: tuple, shape: jax.ShapeDtypeStruct) -> jax.Array:
        noise = rng.normal(size=shape.shape)
        value = {
            "kernel": lambda: 1.5 * noise * shape.shape[-2] ** -0.5,
            "embedding": lambda: noise,
            "scale": lambda: 1.0 + 0.3 * noise,
            "bias": lambda: 0.3 * noise,
        }[path[-1].key]()
        return jnp.asarray(value, jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Hugging Face folder of a random tiny model of each decoder family."""
    root = tmp_path_factory.mktemp("decoders")
    for kind in make_hub.DECODERS:
        make_hub.write_decoder(root / kind, kind)
    return {kind: root / kind for kind in make_hub.DECODERS}


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    """A private copy to damage."""
    make_hub.write_decoder(tmp_path / "model", "llama")
    return tmp_path / "model"
