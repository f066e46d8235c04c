"""What runs left behind, read, compared and shown: report.html and report.json.

build("WORKDIR")                          # or the workdirs of several seeds; the path of the page
report = read("WORKDIR"); print(plain(report))
"""

from __future__ import annotations

from grpo_jax.report.output import build, plain, read, render, write

__all__ = ["build", "plain", "read", "render", "write"]
