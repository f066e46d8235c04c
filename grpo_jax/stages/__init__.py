"""The stages of a run, each a short, flat function over a `Run`."""
