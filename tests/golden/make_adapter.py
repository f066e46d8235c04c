"""What PEFT makes of adapters that we write, and an adapter that PEFT wrote itself.

`random_adapter` needs NumPy only and is what the tests use. Run as a script, with torch,
transformers and peft installed, this file stores the references:

    PYTHONPATH=.:tests python tests/golden/make_adapter.py    # adapter.npz and adapter.json
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
from golden.make_hub import decoder_ids, write_decoder, write_json

from grpo_jax import hub
from grpo_jax.models import lora

HERE = Path(__file__).parent
RANK, ALPHA, DROPOUT = 3, 7.0, 0.1


def random_adapter(policy: hub.Policy, rank: int = RANK, alpha: float = ALPHA) -> hub.Adapter:
    """An adapter of every linear layer, with factors that move the logits by far more than 1e-4."""
    draw = np.random.default_rng(rank)

    def walk(tree: dict) -> dict:
        out = {}
        for name, sub in tree.items():
            if "kernel" in sub:
                layers, fan_in, fan_out = sub["kernel"].shape
                out[name] = {
                    "lora_a": draw.normal(0, 0.5, (layers, fan_in, rank)).astype(np.float32),
                    "lora_b": draw.normal(0, 0.1, (layers, rank, fan_out)).astype(np.float32),
                }
            elif inner := walk({k: v for k, v in sub.items() if isinstance(v, dict)}):
                out[name] = inner
        return out

    return hub.Adapter({"layers": walk(policy.params["layers"])}, rank, alpha, DROPOUT)


def merged(policy: hub.Policy, adapter: hub.Adapter) -> hub.Policy:
    """The model with the adapter in its weights."""
    scale = adapter.alpha / adapter.rank

    def scaled(tree: dict) -> dict:
        if "lora_a" in tree:
            return {"lora_a": tree["lora_a"], "lora_b": tree["lora_b"] * np.float32(scale)}
        return {name: scaled(sub) for name, sub in tree.items()}

    return dataclasses.replace(policy, params=lora.merge(policy.params, scaled(adapter.params)))


def main() -> None:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM

    ids = torch.from_numpy(decoder_ids()).long()

    def logits(model: torch.nn.Module) -> np.ndarray:
        with torch.no_grad():
            return model.eval()(ids).logits.numpy()

    def model_of(folder: Path) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write_decoder(root / "base", "llama")
        policy = hub.load_decoder(root / "base")
        ours = random_adapter(policy)
        hub.save_adapter(policy, ours, root / "ours")
        hub.save_decoder(merged(policy, ours), root / "merged")
        loaded = PeftModel.from_pretrained(model_of(root / "base"), str(root / "ours"))
        golden = {"ours": logits(loaded)}
        whole = logits(model_of(root / "merged"))
        print("peft - transformers on the merged model:", np.abs(golden["ours"] - whole).max())
        print("adapter - base:", np.abs(whole - logits(model_of(root / "base"))).max())
        again = hub.load_decoder(root / "merged").logits(decoder_ids())
        print("ours - transformers on the merged model:", np.abs(np.asarray(again) - whole).max())

        plain = LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules="all-linear",
            task_type="CAUSAL_LM",
        )  # fmt: skip
        get_peft_model(model_of(root / "base"), plain).save_pretrained(root / "plain")
        shapes = {
            name: list(tensor.shape)
            for name, tensor in load_file(root / "plain" / "adapter_model.safetensors").items()
        }
        config = json.loads((root / "plain" / "adapter_config.json").read_text(encoding="utf-8"))

        scaled = LoraConfig(
            r=4, lora_alpha=6, target_modules=["q_proj", "self_attn.v_proj", "down_proj"],
            task_type="CAUSAL_LM", use_rslora=True, init_lora_weights=False,
        )  # fmt: skip
        torch.manual_seed(0)
        model = get_peft_model(model_of(root / "base"), scaled)
        model.save_pretrained(root / "theirs")
        golden["theirs"] = logits(model)
        tensors = load_file(root / "theirs" / "adapter_model.safetensors")
        golden |= {f"tensor/{name}": tensor for name, tensor in tensors.items()}
        theirs = json.loads((root / "theirs" / "adapter_config.json").read_text(encoding="utf-8"))
        for written in (config, theirs):
            written["base_model_name_or_path"] = "BASE"
    np.savez_compressed(HERE / "adapter.npz", **golden)
    write_json(HERE / "adapter.json", {"shapes": shapes, "config": config, "theirs": theirs})


if __name__ == "__main__":
    main()
