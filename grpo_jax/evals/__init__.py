"""Evaluation: pure functions over text and arrays, and the page that shows what they found."""
