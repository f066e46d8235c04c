"""Rewards: what a completion is worth. Start at scorer.py; the formulas are in terms.py."""

from grpo_jax.rewards.anchors import build_anchor
from grpo_jax.rewards.calibrate import calibrate_tau
from grpo_jax.rewards.embedding import similarity
from grpo_jax.rewards.scorer import Scorer, within_group_stats

__all__ = ["Scorer", "build_anchor", "calibrate_tau", "similarity", "within_group_stats"]
