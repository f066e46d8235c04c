"""Weights and text for the demo and the tests: `asset:NAME` becomes a local path.

Nothing here is needed to train on your own model, encoder and data. `python -m grpo_jax.assets`
lists what there is.
"""

from __future__ import annotations

import difflib

from grpo_jax.assets.catalogue import ASSETS
from grpo_jax.assets.store import cache_folder, obtain

__all__ = ["cache_folder", "resolve"]


def resolve(path: str) -> str:
    """Turns `asset:NAME` into a folder or file, fetched or built once; keeps any other path.

    Args:
      path: a local path, a hub id, or `asset:NAME`.

    Returns:
      A local path for an asset; otherwise `path`.

    Raises:
      ValueError: no asset has that name, or a package holds something else than expected.
      FileNotFoundError: a package cannot be had; the message says what to do.
      OSError: the cache cannot be written.
    """
    if not path.startswith("asset:"):
        return path
    name = path.removeprefix("asset:")
    if name not in ASSETS:
        close = difflib.get_close_matches(name, ASSETS, n=1)
        hint = f"; did you mean asset:{close[0]}?" if close else ""
        raise ValueError(f"no asset is called {name!r}{hint} There are: {', '.join(ASSETS)}")
    folder = obtain(name, ASSETS[name])
    return str(folder / ASSETS[name].entry)
