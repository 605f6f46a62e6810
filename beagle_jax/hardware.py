"""Published peaks of accelerators: memory, memory bandwidth and rate of matrix products.

These are the makers' figures for dense operands. No program reaches them, so measurements are given
as shares of them. NVIDIA's data sheets give many rates with sparsity; this table has half of those.
`plan` and the benchmarks use it.
"""

from typing import NamedTuple


class Chip(NamedTuple):
    """One accelerator as its maker describes it, in bytes, bytes/s and operations/s."""

    memory: float
    bandwidth: float  # of the chip's memory
    bfloat16: float | None  # matrix products; None: the chip has no unit for them
    float32: float | None  # matrix products, with TF32 units if it has them; None: not published
    source: str


_HOPPER = "NVIDIA H100 Tensor Core GPU data sheet"
_AMPERE = "NVIDIA A100 Tensor Core GPU data sheet"
_TPU = "Cloud TPU documentation, system architecture"

# The keys are values of `jax.Device.device_kind`.
CHIPS = {
    "NVIDIA B200": Chip(180e9, 8.0e12, 2250e12, 1100e12, "NVIDIA HGX B200 data sheet, one of 8"),
    "NVIDIA H200": Chip(141e9, 4.8e12, 989e12, 494e12, "NVIDIA H200 Tensor Core GPU data sheet"),
    "NVIDIA H100 80GB HBM3": Chip(80e9, 3.35e12, 989e12, 494e12, f"{_HOPPER}, SXM"),
    "NVIDIA H100 PCIe": Chip(80e9, 2.0e12, 756e12, 378e12, f"{_HOPPER}, PCIe"),
    "NVIDIA A100-SXM4-80GB": Chip(80e9, 2.039e12, 312e12, 156e12, f"{_AMPERE}, 80 GB SXM"),
    "NVIDIA A100 80GB PCIe": Chip(80e9, 1.935e12, 312e12, 156e12, f"{_AMPERE}, 80 GB PCIe"),
    "NVIDIA A100-SXM4-40GB": Chip(40e9, 1.555e12, 312e12, 156e12, f"{_AMPERE}, 40 GB SXM"),
    "NVIDIA A100-PCIE-40GB": Chip(40e9, 1.555e12, 312e12, 156e12, f"{_AMPERE}, 40 GB PCIe"),
    "NVIDIA L4": Chip(24e9, 300e9, 121e12, 60e12, "NVIDIA L4 Tensor Core GPU data sheet"),
    # Its float16 peak is 65e12; bfloat16 is computed as float32.
    "Tesla T4": Chip(16e9, 320e9, None, 8.1e12, "NVIDIA T4 Tensor Core GPU data sheet"),
    "TPU v4": Chip(32 * 2**30, 1.2e12, 275e12, None, f"{_TPU}, v4"),
    "TPU v5": Chip(95 * 2**30, 2.765e12, 459e12, None, f"{_TPU}, v5p"),
    "TPU v5 lite": Chip(16 * 2**30, 819e9, 197e12, None, f"{_TPU}, v5e"),
    "TPU v6 lite": Chip(32 * 2**30, 1.64e12, 918e12, None, f"{_TPU}, v6e"),
}


def chip_of(device_kind: str) -> Chip | None:
    """Returns the published figures of a device kind; None if `CHIPS` does not list it."""
    return CHIPS.get(device_kind)


def unknown_chip(device_kind: str) -> str:
    """Returns the message for a device whose peaks are not known."""
    return (
        f"beagle_jax/hardware.py has no published peaks of {device_kind!r}, so shares of the peak "
        f"are left out; known: {', '.join(CHIPS)}"
    )
