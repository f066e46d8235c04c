"""`python -m grpo_jax.assets NAME...` prints where each asset lies, fetching it if need be.

Without a name it lists them.
"""

from __future__ import annotations

import sys

from grpo_jax.assets import cache_folder, resolve
from grpo_jax.assets.catalogue import ASSETS


def main(names: list[str]) -> int:
    """Prints a path a name, or the list; returns the exit status."""
    if any(name in ("-h", "--help") for name in names):
        print(__doc__.strip())
        return 0
    if not names:
        print(f"cache: {cache_folder()}")
        for name, asset in ASSETS.items():
            print(f"{name:28}{asset.disk:5} MB  {asset.licence:12}{asset.about} ({asset.origin})")
        return 0
    for name in names:
        try:
            print(resolve(f"asset:{name.removeprefix('asset:')}"))
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
