"""Device kinds and their published numbers, and the reading of `--devices=v5e-64`.

Sources, by family. TPU: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e: peak, HBM and interconnect
a chip; JAX shows a chip as one device). H100, H200, A100, L4, L40S: NVIDIA's data sheets of the SXM
or PCIe part, dense bfloat16 (the sheets' larger numbers assume sparsity). RTX 4090: NVIDIA's Ada
architecture paper, appendix A, with float32 accumulation. A10G: NVIDIA's A10G data sheet for AWS.
CPU: no specification; eight server cores, in round numbers.
"""

from __future__ import annotations

import dataclasses
import math
import re

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Device:
    """One device as `jax.devices()` counts them. Rates are peaks, in units of 1 a second."""

    kind: str
    memory: float  # bytes of HBM (or of the host)
    flops: float  # bfloat16 FLOP/s, dense
    bandwidth: float  # bytes/s of that memory
    link: float  # bytes/s that leave the device to others of its host or pod, one direction
    network: float  # the same to other hosts; a pod's own links where they reach them
    per_host: int  # devices of one host
    usable: float  # share of the memory that a program gets by default
    source: str

    @property
    def backend(self) -> str:
        """As jax.default_backend() says there."""
        return "cpu" if self.kind == "cpu" else "tpu" if self.kind.startswith("v") else "gpu"

    def local(self, count: int) -> int:
        """Devices of each process, one a host, of a run on `count` of them."""
        if self.kind in ("v5e", "v6e") and count == 8:
            return 8  # the one slice whose host has more than four
        return math.gcd(count, self.per_host)


# TPU runtimes keep 0.25 GiB (the compiler of a v5e offers 15.75 of 16). On a GPU JAX takes 75%
# unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise. Half of a CPU's is left to the system.
_TPU, _GPU, _CPU = 0.984, 0.75, 0.5
_GOOGLE = "cloud.google.com/tpu/docs"
_NVIDIA = "NVIDIA data sheet"
DEVICES = {
    d.kind: d
    for d in (
        Device("v4", 32 * GIB, 275e12, 1.2e12, 150e9, 150e9, 4, _TPU, f"{_GOOGLE}/v4"),
        Device("v5e", 16 * GIB, 197e12, 0.819e12, 100e9, 100e9, 4, _TPU, f"{_GOOGLE}/v5e"),
        Device("v5p", 95 * GIB, 459e12, 2.765e12, 300e9, 300e9, 4, _TPU, f"{_GOOGLE}/v5p"),
        Device("v6e", 32 * GIB, 918e12, 1.64e12, 224e9, 224e9, 4, _TPU, f"{_GOOGLE}/v6e"),
        Device("h100-80gb", 80 * GIB, 989e12, 3.35e12, 450e9, 50e9, 8, _GPU, f"{_NVIDIA}, SXM5"),
        Device("h200", 141e9, 989e12, 4.8e12, 450e9, 50e9, 8, _GPU, f"{_NVIDIA}, SXM5"),
        Device("a100-40gb", 40 * GIB, 312e12, 1.555e12, 300e9, 25e9, 8, _GPU, f"{_NVIDIA}, SXM4"),
        Device("a100-80gb", 80 * GIB, 312e12, 2.039e12, 300e9, 25e9, 8, _GPU, f"{_NVIDIA}, SXM4"),
        Device("l4", 24e9, 121e12, 0.3e12, 32e9, 3e9, 8, _GPU, f"{_NVIDIA}, PCIe 4"),
        Device("l40s", 48e9, 362e12, 0.864e12, 32e9, 12e9, 8, _GPU, f"{_NVIDIA}, PCIe 4"),
        Device("rtx4090", 24e9, 165e12, 1.008e12, 32e9, 3e9, 8, _GPU, "NVIDIA Ada paper"),
        Device("a10g", 24e9, 70e12, 0.6e12, 32e9, 3e9, 8, _GPU, f"{_NVIDIA} for AWS"),
        Device("cpu", 32 * GIB, 0.5e12, 50e9, 10e9, 1e9, 1, _CPU, "none: a nominal 8 cores"),
    )
}
_ALIASES = {
    "v5litepod": "v5e", "v5lite": "v5e", "h100": "h100-80gb", "a100-40": "a100-40gb",
    "a100-80": "a100-80gb", "rtx-4090": "rtx4090", "4090": "rtx4090",
}  # fmt: skip


def parse(text: str) -> tuple[Device, int]:
    """`v5e-64` -> the kind and the number of devices, 1 where none is given.

    The number is that of `jax.devices()`: chips. Google's names of v4 and v5p slices count two
    cores a chip, so that its v5p-128 is `v5p-64` here.

    Raises:
      ValueError: an unknown kind, or a count below 1.
    """
    name = text.strip().lower().replace(" ", "").replace("_", "-")
    for kind in sorted((*DEVICES, *_ALIASES), key=len, reverse=True):
        if match := re.fullmatch(rf"{re.escape(kind)}(?:[-x](\d+))?", name):
            count = int(match[1] or 1)
            if count < 1:
                raise ValueError(f"--devices={text}: wanted at least one device")
            return DEVICES[_ALIASES.get(kind, kind)], count
    raise ValueError(
        f"--devices={text}: unknown; wanted KIND-COUNT, such as v5e-64, KIND one of "
        f"{', '.join(DEVICES)}"
    )
