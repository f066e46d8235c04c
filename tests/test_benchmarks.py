"""The benchmark's own arithmetic: its settings, its work, its ratios."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import models, work
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
