"""Harnesses that try to break the program; each is a command, with a small sample in the tests."""
