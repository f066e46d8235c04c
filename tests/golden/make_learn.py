"""Writes learn.npz: losses, gradients and advantages as TRL's own code computes them, in float64.

    python tests/golden/make_learn.py        (needs torch and trl; made with trl 1.16.0)

The losses come from GRPOTrainer._compute_loss, called on a stand-in for the trainer whose model
returns given log-probs, with the gradient taken with respect to those. The advantages come from the
lines of GRPOTrainer._generate_and_score_completions (and of RLOOTrainer's) that compute them, cut
out of the installed source and run as they stand. Inputs are float32 numbers, so that a float32
test starts from exactly what TRL saw.
"""

from __future__ import annotations

import inspect
import json
import textwrap
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np

P, G, T, LIMIT = 4, 3, 6, 8  # LIMIT is max_completion_length, longer than the padding

# Fields of config.GRPO; on_policy: no old log-probs; micro_batches: prompts i, i + 2, ... each.
CASES = {
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo"},
    "clip_higher": {"loss_type": "dapo", "epsilon_high": 0.45},
    "two_sided": {"loss_type": "dapo", "delta": 1.5, "epsilon_high": 0.3},
    "gspo": {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "epsilon": 0.02,
        "epsilon_high": 0.03,
    },
    "on_policy": {"loss_type": "grpo", "on_policy": True},
    "kl": {"loss_type": "dapo", "beta": 0.2},
    "kl_uncorrected": {"loss_type": "dapo", "beta": 0.2, "kl_bias_correction": False},
    "kl_on_policy": {"loss_type": "grpo", "beta": 0.2, "on_policy": True},
    "kl_sequence": {"loss_type": "grpo", "beta": 0.2, "importance_sampling_level": "sequence"},
    "grpo_accumulated": {"loss_type": "grpo", "beta": 0.1, "micro_batches": 2},
    "bnpo_accumulated": {"loss_type": "bnpo", "beta": 0.1, "micro_batches": 2},
    "dr_grpo_accumulated": {"loss_type": "dr_grpo", "beta": 0.1, "micro_batches": 2},
    "dapo_accumulated": {"loss_type": "dapo", "beta": 0.1, "micro_batches": 2},
}
WEIGHTS = {"semantic": 1.5, "language": 1.0, "length": -0.5}


def inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    logps = -rng.gamma(2.0, 1.0, (P, G, T))
    lengths = np.array([[6, 3, 1], [6, 0, 4], [2, 5, 6], [6, 6, 6]])  # 0: a masked row
    rewards = rng.uniform(0, 1, (3, P, G))
    rewards[1] = rewards[1] > 0.4
    rewards[:, 1] = rewards[:, 1, :1]  # a group without spread
    arrays = {
        "logps": logps,
        "old_logps": logps + rng.normal(0, 0.3, logps.shape),
        "ref_logps": logps + rng.normal(0, 0.5, logps.shape),
        "advantages": rng.normal(size=(P, G)),
        "rewards": rewards,
    }
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    return arrays | {"mask": np.arange(T) < lengths[..., None]}


def trl_loss(case: dict, arrays: dict[str, np.ndarray]) -> tuple[float, np.ndarray, dict]:
    """Loss, its gradient in logps [P, G, T], and the means of TRL's metrics."""
    import torch
    from trl import GRPOTrainer

    parts = case.get("micro_batches", 1)
    logps = torch.tensor(arrays["logps"].astype(np.float64), requires_grad=True)
    metrics: dict = {"train": defaultdict(list)}
    stub = SimpleNamespace(
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(
            delta=case.get("delta"),
            use_bias_correction_kl=case.get("kl_bias_correction", True),
            steps_per_generation=parts,
        ),
        accelerator=SimpleNamespace(
            num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x
        ),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=case.get("importance_sampling_level", "token"),
        beta=case.get("beta", 0.0),
        loss_type=case["loss_type"],
        epsilon_low=case.get("epsilon", 0.2),
        epsilon_high=case.get("epsilon_high", case.get("epsilon", 0.2)),
        use_vllm=False,
        current_gradient_accumulation_steps=parts,
        max_completion_length=LIMIT,
        _entropy_bonus_enabled=False,
        _metrics=metrics,
    )
    total = 0.0
    for part in range(parts):

        def rows(name: str, part: int = part) -> torch.Tensor:
            array = arrays[name]
            array = array.astype(np.float64) if array.dtype == np.float32 else array.astype(int)
            return torch.tensor(array[part::parts]).flatten(0, 1)

        new = logps[part::parts].flatten(0, 1)
        stub._get_per_token_logps_and_entropies = lambda *_, new=new, **__: (new, new * 0, None)
        mask = rows("mask")
        batch = {
            "prompt_ids": mask[:, :0],
            "prompt_mask": mask[:, :0],
            "completion_ids": mask,
            "completion_mask": mask,
            "advantages": rows("advantages"),
            "ref_per_token_logps": rows("ref_logps"),
            "num_items_in_batch": torch.tensor(arrays["mask"].sum()),
        }
        if not case.get("on_policy"):
            batch["old_per_token_logps"] = rows("old_logps")
        loss = GRPOTrainer._compute_loss(stub, None, batch)
        loss.backward()
        total += loss.item()
    means = {name: float(np.mean(values)) for name, values in metrics["train"].items()}
    return total, logps.grad.numpy(), means


def trl_advantages(trainer: type, first: str, last: str, rewards: np.ndarray, **settings):
    """Runs the lines from the one that starts with `first` to the one before `last`."""
    import torch
    from trl.trainer import utils

    source = inspect.getsource(trainer._generate_and_score_completions)
    start = source.rindex("\n", 0, source.index(first)) + 1
    lines = textwrap.dedent(source[start : source.index(last, start)])
    per_func = torch.tensor(rewards.astype(np.float64)).flatten(1).T
    weights = torch.tensor(list(WEIGHTS.values()), dtype=torch.float64)
    scope = {
        "torch": torch,
        "nanstd": utils.nanstd,
        "device": "cpu",
        "num_generations": G,
        "rewards_per_func": per_func,
        "rewards": (per_func * weights).sum(1),
        "unscorable_mask": torch.zeros(P * G, dtype=torch.bool),
        "self": SimpleNamespace(reward_weights=weights, reward_funcs=list(WEIGHTS), **settings),
    }
    exec(lines, scope)
    return scope["advantages"].numpy().reshape(P, G)


def main() -> None:
    from trl import GRPOTrainer, RLOOTrainer

    arrays = inputs()
    out = dict(arrays)
    metrics = {}
    for name, case in CASES.items():
        loss, grad, metrics[name] = trl_loss(case, arrays)
        out |= {f"loss/{name}": np.float64(loss), f"grad/{name}": grad}
    grpo = (
        GRPOTrainer,
        'if self.multi_objective_aggregation == "sum_then_normalize"',
        "# Unscorable completions",
    )
    rloo = RLOOTrainer, "grouped_rewards = rewards.view", "# Normalize advantages"
    for scale in ("group", "batch", "none"):
        out[f"advantages/{scale}"] = trl_advantages(
            *grpo,
            arrays["rewards"],
            scale_rewards=scale,
            multi_objective_aggregation="sum_then_normalize",
        )
    out["advantages/gdpo"] = trl_advantages(
        *grpo, arrays["rewards"], multi_objective_aggregation="normalize_then_sum"
    )
    out["advantages/rloo"] = trl_advantages(*rloo, arrays["rewards"])
    about = {"cases": CASES, "weights": WEIGHTS, "limit": LIMIT, "metrics": metrics}
    np.savez_compressed(Path(__file__).with_name("learn.npz"), about=json.dumps(about), **out)


if __name__ == "__main__":
    main()
