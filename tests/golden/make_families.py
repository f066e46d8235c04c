"""What transformers computes from the tiny models of families.py.

Needs torch and transformers:

    PYTHONPATH=. python tests/golden/make_families.py             # families.npz, about a minute
    PYTHONPATH=. python tests/golden/make_families.py --exports   # it reads what we export
    PYTHONPATH=. python tests/golden/make_families.py --sizes     # full_size.json's counts

Each text is run alone, in a batch padded on the left and in one padded on the right; the three
must agree. The kinds dynamic and longrope have frequencies that depend on the length of the text.
Their references come from feeding transformers token by token with its cache, see models/rope.py.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from families import (
    CASES,
    COLUMNS,
    NEW_TOKENS,
    ORIGINAL,
    PROMPTS,
    STEPWISE,
    VOCAB,
    family_rows,
    family_tensors,
    gradient_parts,
    write_family,
)
from safetensors.numpy import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

from grpo_jax.hub.decoder_config import export_json

MARGIN = 1e-3  # between the two best tokens of every greedy step


def _load(folder: Path) -> Any:
    images = json.loads((folder / "config.json").read_text())["model_type"] == "gemma3"
    model, info = (AutoModelForImageTextToText if images else AutoModelForCausalLM).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    keys = [key for found in info.values() for key in found]
    assert all("vision_tower" in str(k) or "projector" in str(k) for k in keys), info
    return model.eval()


def _padded(model: Any, rows: list[np.ndarray], side: str) -> list[Any]:
    """Logits [T, V] of each row, from one padded batch."""
    width = max(map(len, rows))
    ids, mask = np.full((len(rows), width), 5), np.zeros((len(rows), width), int)
    starts = [width - len(row) if side == "left" else 0 for row in rows]
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ids[i, start : start + len(row)] = row
        mask[i, start : start + len(row)] = 1
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    out = model(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        position_ids=torch.from_numpy(positions),
    ).logits
    spans = zip(out, rows, starts, strict=True)
    return [logits[start : start + len(row)] for logits, row, start in spans]


def _alone(model: Any, row: np.ndarray, stepwise: bool) -> Any:
    """Logits [T, V] of one row without padding."""
    ids = torch.from_numpy(row)[None]
    if not stepwise:
        return model(input_ids=ids).logits[0]
    found, cache = [], None
    for t in range(len(row)):
        out = model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits[0, 0])
    return torch.stack(found)


def _greedy(model: Any, prompt: np.ndarray) -> tuple[list[int], float]:
    """The greedy completion of one prompt, token by token, and its smallest margin."""
    out = model(input_ids=torch.from_numpy(prompt)[None], use_cache=True)
    tokens: list[int] = []
    margin = np.inf
    for _ in range(NEW_TOKENS):
        best = torch.topk(out.logits[0, -1], 2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        tokens.append(int(best.indices[0]))
        ids = torch.tensor([[tokens[-1]]])
        out = model(input_ids=ids, past_key_values=out.past_key_values, use_cache=True)
    return tokens, margin


def _prompts_and_completions(model: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Prompts whose greedy completions no rounding can change."""
    prompts, completions = np.zeros((3, max(PROMPTS)), int), np.zeros((3, NEW_TOKENS), int)
    for i, length in enumerate(PROMPTS):
        for seed in range(50):
            prompt = np.random.default_rng([i, seed]).integers(0, VOCAB, length)
            completions[i], margin = _greedy(model, prompt)
            if margin > MARGIN and len(set(completions[i][-16:])) > 1:
                break
        else:
            raise AssertionError(f"{name}: every prompt has a close call")
        prompts[i, :length] = prompt
    return prompts, completions


def _reference(folder: Path, name: str) -> dict[str, np.ndarray]:
    model, stepwise, rows = _load(folder), name in STEPWISE, family_rows()
    found = [_alone(model, row, stepwise) for row in rows]
    with torch.no_grad():
        short = [row[:ORIGINAL] for row in rows] if stepwise else rows
        for side in ("left", "right"):
            for padded, alone in zip(_padded(model, short, side), found, strict=True):
                assert (padded - alone[: len(padded)]).abs().max() < 2e-5, (name, side)
        prompts, completions = _prompts_and_completions(model, name)
    total = sum(
        torch.log_softmax(logits[:-1], -1)[torch.arange(len(row) - 1), row[1:]].sum()
        for logits, row in zip(found, rows, strict=True)
    )
    (total / sum(len(row) - 1 for row in rows)).backward()
    golden = {
        "logits": torch.cat(found).detach().numpy()[:, COLUMNS],
        "prompts": prompts.astype(np.int16),
        "completions": completions.astype(np.int16),
    }
    parameters = dict(model.named_parameters())
    for key, part in gradient_parts(name).items():
        theirs = key.replace("model.", "model.language_model.") if name == "gemma3" else key
        golden[f"gradient/{key}"] = parameters[theirs].grad.numpy()[part]
    return golden


def make() -> None:
    golden = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in CASES:
            write_family(Path(temporary) / name, name)
            found = _reference(Path(temporary) / name, name)
            golden |= {f"{name}/{key}": value for key, value in found.items()}
            large = {k.split(".", 2)[-1]: float(np.abs(v).max().round(3)) for k, v in found.items()}
            print(name, large)
    np.savez_compressed(Path(__file__).with_name("families.npz"), **golden)


def check_exports() -> None:
    """transformers reads what export_json writes as it reads the original."""
    for name in CASES:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            write_family(folder, name)
            before = _alone(_load(folder), family_rows()[0], name in STEPWISE)
            config = json.dumps(export_json(folder))
            (folder / "config.json").write_text(config, encoding="utf-8")
            save_file(family_tensors(name), folder / "model.safetensors", metadata={"format": "pt"})
            after = _alone(_load(folder), family_rows()[0], name in STEPWISE)
            assert torch.equal(before, after), name
            print(name, "reads the same")


def count_full_sizes() -> None:
    """Fills in `parameters` of full_size.json, the language models' sizes, on the meta device.

    `published` is what the models' pages say, with the parts that see; it must come out too.
    """
    file = Path(__file__).with_name("full_size.json")
    models = json.loads(file.read_text())
    for name, entry in models.items():
        fields = {key: value for key, value in entry["config"].items() if key != "auto_map"}
        config = CONFIG_MAPPING[fields["model_type"]].from_dict(copy.deepcopy(fields))
        images = config.model_type == "gemma3"
        with torch.device("meta"):
            whole = (AutoModelForImageTextToText if images else AutoModelForCausalLM).from_config
            assert whole(config).num_parameters() == entry["published"], name
            text = AutoModelForCausalLM.from_config(config.text_config if images else config)
        entry["parameters"] = text.num_parameters()
        print(name, entry["parameters"])
    file.write_text(json.dumps(models, indent=1) + "\n")


if __name__ == "__main__":
    if "--sizes" in sys.argv:
        count_full_sizes()
    else:
        check_exports() if "--exports" in sys.argv else make()
