"""GPUs by name: what they compute and hold, from their makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass

TERA, GIBI = 10**12, 2**30


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        memory: Bytes.
        bf16: Dense matrix FLOP/s in bfloat16 (in float16 where it has no bfloat16).
        tf32: Dense matrix FLOP/s in TF32: 0 where it has none.
        fp32: FLOP/s in float32.
        link: Bytes/s in one direction to the other GPUs of its node.
    """

    memory: int
    bf16: float
    tf32: float
    fp32: float
    link: float

    def peak(self, precision: str, *, tf32: bool = False) -> float:
        """FLOP/s that a run in this precision cannot exceed."""
        if precision == "bf16":
            return self.bf16
        return self.tf32 if tf32 and self.tf32 else self.fp32


def _gpu(gib: int, bf16: float, tf32: float, fp32: float, link: float) -> Gpu:
    return Gpu(gib * GIBI, bf16 * TERA, tf32 * TERA, fp32 * TERA, link * 1e9)


GPUS: dict[str, Gpu] = {
    "V100": _gpu(16, 125, 0, 15.7, 150),
    "T4": _gpu(16, 65, 0, 8.1, 16),
    "A10": _gpu(24, 125, 62.5, 31.2, 32),
    "L4": _gpu(24, 121, 60, 30.3, 32),
    "L40S": _gpu(48, 362, 183, 91.6, 32),
    "A100": _gpu(80, 312, 156, 19.5, 300),
    "H100": _gpu(80, 989, 494, 66.9, 450),
    "H200": _gpu(141, 989, 494, 66.9, 450),
    "B200": _gpu(180, 2250, 1100, 75, 900),
}
"""Boards with NVLink where there is one (SXM). PCIe boards of the same name are slower."""


def find(name: str) -> Gpu | None:
    """The GPU a device or a resource calls itself ("NVIDIA H100 80GB HBM3", "A100-80G")."""
    words = name.upper().replace("-", " ").replace("_", " ").split()
    return next((gpu for known, gpu in GPUS.items() if known in words), None)
