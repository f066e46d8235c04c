"""The alignment-tax experiment as rows of `Config.arms`: one cold start, and what is claimed of it
put beside the baselines and controls that could explain it away.

What arXiv 2605.14366 compares is two points, an SFT and a GRPO whose learning rates differ 40-fold.
Here SFT is a front of learning rates, GRPO is taken apart term by term, a control is rewarded by
the references of other rows, and every arm's weights are also the start of another task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grpo_jax.config import Arm

Overrides = Mapping[str, Any]

# SG-SRL's reward (arXiv 2605.29502): gate * max(r - 0.20 p_len - 0.05 p_rep, 0) against the source,
# the length penalty rising from 2.5 to 5 times the batch's median, repetition from 0.15.
SG_SRL = {
    "reward.anchor": "source",
    "reward.semantic_weight": 1.0,
    "reward.language_weight": 0.0,
    "reward.hard_gate": True,
    "reward.length_weight": 0.2,
    "reward.max_length_ratio": 2.5,
    "reward.min_length_ratio": 0.0,
    "reward.repetition_weight": 0.05,
    "reward.max_repetition": 0.15,
    "reward.tau": 0.0,
}


def tax_arms(
    learning_rates: Sequence[float],
    *,
    sft: Overrides,
    recover: Overrides,
    transfer: Overrides | None = None,
    transfer_from: Sequence[str] | None = None,
) -> tuple[Arm, ...]:
    """The arms of the experiment; the configuration's own sft and grpo sections are the cold
    start's and semantic GRPO's.

    Args:
      learning_rates: of SFT on all rows after the cold start, ascending; the last is the strong
        one.
      sft: what else these SFT arms set, such as their epochs.
      recover: what the short SFT after SG-SRL sets; it sees the cold start's rows.
      transfer: fields of another task (data.* and sft.*), which then is the group "transfer": every
        arm is fine-tuned on it. None leaves it out.
      transfer_from: the arms whose weights are carried over, base among them; None: all.

    Returns:
      cold, sft-RATE ..., self-sft, grpo, grpo-no-gate, grpo-bleu, grpo-chrf, grpo-beta-0,
      grpo-shuffled, mix, sg-srl, sg-srl-recover, and NAME-transfer of each.
    """
    rates = [f"sft-{rate:.0e}".replace("e-0", "e-") for rate in learning_rates]
    arms = [Arm("cold", "sft")]
    for name, rate in zip(rates, learning_rates, strict=True):
        own = {"data.cold_start_rows": 0, **sft, "sft.optimizer.learning_rate": rate}
        arms.append(Arm(name, "sft", "cold", overrides=own))
    arms.append(Arm("self-sft", "self_sft", "cold"))
    variants: dict[str, dict[str, Any]] = {
        "grpo": {},
        "grpo-no-gate": {"reward.language_weight": 0.0},
        "grpo-bleu": {"reward.metric": "bleu"},
        "grpo-chrf": {"reward.metric": "chrf"},
        "grpo-beta-0": {"grpo.beta": 0.0},
        "grpo-shuffled": {"reward.anchor": "shuffled"},
    }
    arms += [Arm(name, "grpo", "cold", overrides=own) for name, own in variants.items()]
    between = {"interpolate.toward": "grpo", "interpolate.weight": 0.5}
    arms.append(Arm("mix", "interpolate", rates[-1], overrides=between))
    arms.append(Arm("sg-srl", "grpo", "cold", overrides=SG_SRL))
    arms.append(Arm("sg-srl-recover", "sft", "sg-srl", overrides=dict(recover)))
    if transfer is not None:
        starts = ["base", *(arm.name for arm in arms)] if transfer_from is None else transfer_from
        arms += [Arm(f"{s}-transfer", "sft", s, "transfer", dict(transfer)) for s in starts]
    return tuple(arms)
