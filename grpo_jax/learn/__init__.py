"""Log-probs, advantages, objectives and the one jitted update step."""
