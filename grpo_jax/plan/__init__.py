"""What a run will need, from its configuration alone: see `python -m grpo_jax.plan --help`."""
