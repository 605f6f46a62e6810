"""Devices that are not there: topologies of TPUs and GPUs, for which XLA can compile.

TPUs need the libtpu wheel. GPUs need JAX's CUDA plugin (jax-cuda13-plugin and jax-cuda13-pjrt), but
no driver and none of NVIDIA's libraries. Nothing can be run on these devices.
"""

import importlib.util
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax.experimental import topologies

from beagle_jax.errors import UsageError
from beagle_jax.hardware import CHIPS, Chip

# Names of GPUs in a topology, and the chip that each one means.
GPUS = {
    "b200": "NVIDIA B200",
    "h200": "NVIDIA H200",
    "h100": "NVIDIA H100 80GB HBM3",
    "a100": "NVIDIA A100-SXM4-80GB",
    "l4": "NVIDIA L4",
    "t4": "Tesla T4",
}
_GPU = re.compile(rf"({'|'.join(GPUS)})(?::(?:(\d+)x)?(\d+))?")
_EXAMPLES = "v5e:1, v5e:4x4, v5p:2x2x2, v6e:4x4, v4:2x2x2; h100:8, h200, a100:8, l4, t4, b200:2x8"
_SINGLE_TPU = re.compile(r"(v\d+\w*):1(?:x1)*")
_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


def topology_devices(name: str) -> list[jax.Device]:
    """Returns descriptions of the devices of a topology, such as "v5e:4x4", "l4" or "b200:2x8".

    "v5e:1" is a single chip.

    A GPU's name is followed by the number of GPUs, or by hosts x GPUs of each.

    Raises:
        UsageError: the compiler is not installed, or does not know the name.
    """
    if match := _GPU.fullmatch(name):
        kind, hosts, count = match[1], int(match[2] or 1), int(match[3] or 1)
        return _gpus(name, GPUS[kind], hosts, count)
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise UsageError(
            f"--topology {name} compiles with the libtpu wheel, which is not installed: pip "
            "install 'beagle-jax[tpu]' (Linux on x86; no TPU is needed); GPUs are named "
            f"{', '.join(GPUS)}"
        ) from None
    full: dict[str, Any] = {"topology_name": name}
    if match := _SINGLE_TPU.fullmatch(name):  # by default, libtpu takes a host to have more chips
        full = {"topology_name": f"{match[1]}:1x1x1", "chips_per_host_bounds": (1, 1, 1)}
    try:
        with hidden_warnings():
            return list(topologies.get_topology_desc(platform="tpu", **full).devices)
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"--topology {name}: libtpu does not know it ({first_line(error)}); examples: "
            f"{_EXAMPLES}"
        ) from error


def _gpus(name: str, chip: str, hosts: int, count: int) -> list[jax.Device]:
    if not any(importlib.util.find_spec(plugin) for plugin in _PLUGINS):
        version = jax.__version__
        raise UsageError(
            f"--topology {name} compiles with JAX's CUDA plugin, which is not installed: pip "
            f"install --no-deps jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version} (no GPU is "
            "needed)"
        )
    # The plugin otherwise asks for cuDNN and other libraries, which only running needs.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    try:
        with hidden_warnings():
            made = topologies.get_topology_desc(
                platform="cuda",
                topology_name=name,
                topology=f"{hosts}x1x{count}",
                target_config=gpu_target(chip, CHIPS[chip]),
            )
        return list(made.devices)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise UsageError(
            f"--topology {name}: JAX's CUDA plugin does not describe it ({first_line(error)}); "
            f"examples: {_EXAMPLES}"
        ) from error


def gpu_target(name: str, chip: Chip) -> str:
    """Returns XLA's description of a GPU, a text of its message GpuTargetConfig."""
    core = chip.core
    assert core is not None  # of every chip in GPUS
    major, minor = core.capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: {48 * 1024}
  shared_memory_per_block_optin: {core.shared_per_block}
  shared_memory_per_core: {core.shared}
  threads_per_core_limit: {core.threads}
  core_count: {core.multiprocessors}
  fpus_per_core: {core.lanes}
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(chip.bandwidth)}
  l2_cache_size: {core.cache}
  clock_rate_ghz: {core.clock}
  device_memory_size: {int(chip.memory)}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 13 minor: 0 }}
device_description_str: "{name}"
"""


@contextmanager
def hidden_warnings() -> Iterator[None]:
    """Hides what libraries of C++ write to stderr, such as libtpu without a TPU.

    Python's exceptions are raised as always.
    """
    with tempfile.TemporaryFile() as hidden:
        stderr = os.dup(2)
        try:
            os.dup2(hidden.fileno(), 2)
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def first_line(error: Exception) -> str:
    """Returns the first sentence of a compiler's message, at most 300 characters."""
    return re.split(r"\n|\. ", str(error).strip())[0][:300]
