"""Evaluation: pure functions over text and arrays, and a model's answers to tasks."""
