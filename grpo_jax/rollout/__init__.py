"""Sampling completions: one jitted prefill and decode loop."""
