"""Measures grpo_jax against what people would otherwise use, on the same work, in one run."""
