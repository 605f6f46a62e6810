"""Published peaks of accelerators: memory, memory bandwidth and rate of matrix products.

These are the makers' figures for dense operands. No program reaches them, so measurements are given
as shares of them. NVIDIA's data sheets give many rates with sparsity; this table has half of those.
`plan` and the benchmarks use it.
"""

from typing import NamedTuple

import jax


class Core(NamedTuple):
    """What XLA's GPU compiler asks of a GPU, from NVIDIA's documents."""

    capability: tuple[int, int]  # compute capability
    multiprocessors: int
    shared: int  # bytes of shared memory per multiprocessor
    shared_per_block: int  # bytes that a block can request
    threads: int  # resident threads per multiprocessor
    lanes: int  # float32 units per multiprocessor
    cache: int  # bytes of L2
    clock: float  # GHz, boost


class Chip(NamedTuple):
    """One accelerator as its maker describes it, in bytes, bytes/s and operations/s."""

    memory: float
    bandwidth: float  # of the chip's memory
    bfloat16: float | None  # matrix products; None: the chip has no unit for them
    float32: float | None  # matrix products, with TF32 units if it has them; None: not published
    source: str
    float16: float | None = None  # matrix products; None: not published
    int8: float | None = None  # matrix products
    core: Core | None = None  # of GPUs that `plan --topology` compiles for


_HOPPER = "NVIDIA H100 Tensor Core GPU data sheet"
_AMPERE = "NVIDIA A100 Tensor Core GPU data sheet"
_TPU = "Cloud TPU documentation, system architecture"

# Sizes per multiprocessor: CUDA C++ Programming Guide, technical specifications per compute
# capability. Multiprocessors, L2 and clocks: NVIDIA's architecture white papers and data sheets.
_KIB = 1024
_T4 = Core((7, 5), 40, 64 * _KIB, 64 * _KIB, 1024, 64, 4 << 20, 1.59)
_A100 = Core((8, 0), 108, 164 * _KIB, 163 * _KIB, 2048, 64, 40 << 20, 1.41)
_L4 = Core((8, 9), 58, 100 * _KIB, 99 * _KIB, 1536, 128, 48 << 20, 2.04)
_H100 = Core((9, 0), 132, 228 * _KIB, 227 * _KIB, 2048, 128, 50 << 20, 1.98)
_B200 = Core((10, 0), 148, 228 * _KIB, 227 * _KIB, 2048, 128, 126 << 20, 1.965)

# The keys are values of `jax.Device.device_kind`.
CHIPS = {
    "NVIDIA B200": Chip(
        180e9,
        8.0e12,
        2250e12,
        1100e12,
        "NVIDIA HGX B200 data sheet, one of 8",
        float16=2250e12,
        int8=4500e12,
        core=_B200,
    ),
    "NVIDIA H200": Chip(
        141e9,
        4.8e12,
        989e12,
        494e12,
        "NVIDIA H200 Tensor Core GPU data sheet",
        float16=989e12,
        int8=1979e12,
        core=_H100,
    ),
    "NVIDIA H100 80GB HBM3": Chip(
        80e9,
        3.35e12,
        989e12,
        494e12,
        f"{_HOPPER}, SXM",
        float16=989e12,
        int8=1979e12,
        core=_H100,
    ),
    "NVIDIA H100 PCIe": Chip(
        80e9, 2.0e12, 756e12, 378e12, f"{_HOPPER}, PCIe", float16=756e12, int8=1513e12
    ),
    "NVIDIA A100-SXM4-80GB": Chip(
        80e9,
        2.039e12,
        312e12,
        156e12,
        f"{_AMPERE}, 80 GB SXM",
        float16=312e12,
        int8=624e12,
        core=_A100,
    ),
    "NVIDIA A100 80GB PCIe": Chip(
        80e9, 1.935e12, 312e12, 156e12, f"{_AMPERE}, 80 GB PCIe", float16=312e12, int8=624e12
    ),
    "NVIDIA A100-SXM4-40GB": Chip(
        40e9, 1.555e12, 312e12, 156e12, f"{_AMPERE}, 40 GB SXM", float16=312e12, int8=624e12
    ),
    "NVIDIA A100-PCIE-40GB": Chip(
        40e9, 1.555e12, 312e12, 156e12, f"{_AMPERE}, 40 GB PCIe", float16=312e12, int8=624e12
    ),
    "NVIDIA L4": Chip(
        24e9,
        300e9,
        121e12,
        60e12,
        "NVIDIA L4 Tensor Core GPU data sheet",
        float16=121e12,
        int8=242e12,
        core=_L4,
    ),
    # It computes bfloat16 as float32.
    "Tesla T4": Chip(
        16e9,
        320e9,
        None,
        8.1e12,
        "NVIDIA T4 Tensor Core GPU data sheet",
        float16=65e12,
        int8=130e12,
        core=_T4,
    ),
    "TPU v4": Chip(32 * 2**30, 1.2e12, 275e12, None, f"{_TPU}, v4", int8=275e12),
    "TPU v5": Chip(95 * 2**30, 2.765e12, 459e12, None, f"{_TPU}, v5p", int8=918e12),
    "TPU v5 lite": Chip(16 * 2**30, 819e9, 197e12, None, f"{_TPU}, v5e", int8=394e12),
    "TPU v6 lite": Chip(32 * 2**30, 1.64e12, 918e12, None, f"{_TPU}, v6e", int8=1836e12),
}


def memory_stats(device: jax.Device) -> dict[str, int]:
    """Returns what a device says of its memory; nothing for CPUs and devices of a topology."""
    try:
        return device.memory_stats() or {}
    except (jax.errors.JaxRuntimeError, NotImplementedError):  # raised by devices of a topology
        return {}


def chip_of(device_kind: str) -> Chip | None:
    """Returns the published figures of a device kind; None if `CHIPS` does not list it."""
    return CHIPS.get(device_kind)


def unknown_chip(device_kind: str) -> str:
    """Returns the message for a device whose peaks are not known."""
    return (
        f"beagle_jax/hardware.py has no published peaks of {device_kind!r}, so shares of the peak "
        f"are left out; known: {', '.join(CHIPS)}"
    )
