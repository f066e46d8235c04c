"""Decoder, encoder and LoRA: Flax Linen modules over plain nested dicts of parameters."""
