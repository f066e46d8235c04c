"""The benchmark's own arithmetic: its settings, its work, its ratios."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import hlo, models, scaling, work
from benchmarks.table import compare, render
from grpo_jax import hub


def test_settings_reach_the_work_and_bad_ones_are_named():
    tasks = work.override(work.TASKS, ["grpo_step.prompts=7", "grpo_step.remat=false"])
    assert (tasks["grpo_step"].work.prompts, tasks["grpo_step"].work.remat) == (7, False)
    assert work.TASKS["grpo_step"].work.prompts == 4
    for setting in ("grpo_step.promts=7", "step.prompts=7", "grpo_step.remat=maybe"):
        with pytest.raises(ValueError, match=setting.replace(".", r"\.")):
            work.override(work.TASKS, [setting])


def test_stop_ids_are_the_share_that_gives_the_mean_length():
    shape = work.SIZES["S"]
    stops = work.stop_ids(shape, 32)
    assert len(set(stops)) == len(stops) == shape.vocab // 32
    assert work.stop_ids(shape, 0) == [work.EOS]


def test_the_written_model_loads_and_reads_its_prompts(tmp_path):
    shape = work.SIZES["tiny"]
    models.write_model(tmp_path / "model", shape)
    policy = hub.load_decoder(tmp_path / "model")
    assert policy.config.num_layers == shape.layers
    ids = work.prompt_ids(shape, 2, 9)
    texts = work.prompt_texts(ids)
    assert [policy.tokenizer.encode_prompt(text, chat=False) for text in texts] == ids
    assert np.isfinite(np.asarray(policy.logits(ids))).all()


def program(name: str, seconds: list[float], rates: list[float] | None) -> dict:
    out = {
        "program": name, "seconds": seconds, "cpu_seconds": [2 * s for s in seconds],
        "median_seconds": float(np.median(seconds)), "first_seconds": 9.0, "load_seconds": 1.0,
        "median_cpu_seconds": float(np.median(seconds)) * 2, "check": -1.0, "device_peak": 0,
        "peak_rss": 10**9 if name == "ours" else 4 * 10**9, "versions": {}, "last_run": {},
    }  # fmt: skip
    if rates is not None:
        out |= {"unit": "tokens", "rates": rates, "median_rate": float(np.median(rates))}
    return out


@pytest.mark.parametrize("rates", [None, 100.0])
def test_ratios_are_how_many_times_as_fast_ours_is(rates):
    ours = program("ours", [1.0, 2.0, 3.0], rates and [rates, 2 * rates, 3 * rates])
    peer = program("trl", [8.0, 10.0, 12.0], rates and [rates / 2] * 3)
    ratio = compare("grpo_step", "S", "float32", ours, peer)
    assert ratio["faster"] == pytest.approx(4.0 if rates else 5.0)
    assert ratio["memory"] == 0.25 and ratio["same_model"] is True
    peer["check"] = -1.1
    assert compare("grpo_step", "S", "float32", ours, peer)["same_model"] is False
    record = {
        "task": "grpo_step", "size": "S", "against": "trl", "device": "cpu", "dtype": "float32",
        "ours": ours, "peer": peer, "ratio": compare("grpo_step", "S", "float32", ours, peer),
        "work": {},
    }  # fmt: skip
    assert "DIFFERENT MODELS" in render([record])


def test_loops_count_as_often_as_they_turn():
    """Five products whose sums go over eight devices, and one array that is gathered whole."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    along, whole = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in ((None, "fsdp"), ()))

    def turn(x, weight):
        return jax.lax.with_sharding_constraint(jnp.tanh(x @ weight), along), None

    def program(x, weights):
        out, _ = jax.lax.scan(turn, x, weights)
        return jax.lax.with_sharding_constraint(out, whole)

    x = jax.ShapeDtypeStruct((4, 64), jnp.float32, sharding=along)
    rows = jax.NamedSharding(mesh, jax.P(None, "fsdp", None))
    weights = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=rows)
    found = hlo.read(jax.jit(program).lower(x, weights).compile().as_text())
    assert found.flops == 5 * 2 * 4 * 64 * 64 / 8
    looped = [one for one in found.collectives if one.loops]
    assert looped and all(one.times == 5 for one in looped)
    assert found.exchanged("all-reduce") + found.exchanged("reduce-scatter") == 5 * 4 * 64 * 4
    assert found.exchanged("all-gather") == 4 * 64 * 4
    bad = scaling.offences(found, {"kernel": weights}, 1, lanes=4, largest=63)
    assert len(bad) == 1 and bad[0].startswith("f32[4, 64]")
    assert not scaling.offences(found, {"kernel": weights}, 1, lanes=4, largest=64)
    assert not scaling.offences(found, {"kernel": jnp.zeros((64, 4))}, 1, lanes=0, largest=0)
