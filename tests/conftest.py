"""Fixtures that all tests share: strict JAX settings and a tiny random target."""

import gc
import itertools
import logging
import os
import socket
import sys
import threading
from collections.abc import Container, Iterable, Mapping
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs here take longer to compile than to run, the real target's too: without LLVM's optimizer
# and the newer fusion code a decoding loop compiles in a quarter of the time. In one part instead
# of 32 it takes another tenth less, and a dozen memory maps instead of 200. XLA ends the process
# over a flag that it does not know, so only where it was seen.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# With JAX_DISABLE_MOST_OPTIMIZATIONS=0 programs are compiled as users have them.
# Two workers on two cores: threads of torch and numpy would only take the other's time, some of it
# to wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and version("jax").startswith("0.10."):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "")
        + " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    )

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beagle_jax import terminal
from beagle_jax.config import EarlyStage, LateStage, MeshConfig
from beagle_jax.model.beagle import BeagleSpec, init_draft
from beagle_jax.model.target import TargetSpec
from beagle_jax.model.tensors import param_table
from beagle_jax.sharding import make_mesh
from beagle_jax.training.frozen import FrozenTarget

jax.config.update("jax_numpy_rank_promotion", "raise")
# Compiled programs are kept between runs, per user: most of a cold run's time is compilation. Those
# of one small operation compile in less than this; reading them back would take as long.
jax.config.update(
    "jax_compilation_cache_dir", str(Path("~/.cache/beagle_jax/xla_tests").expanduser())
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


def share_contexts(lowerings: int) -> None:
    """Lets so many lowerings share one MLIR context; jax makes one for each.

    Making one takes 6 of the 8 milliseconds that lowering a small operation takes, and the tests
    lower thousands of them. A context keeps the constants of its modules, so now and then a new one
    is made.
    """
    make, made, turn = mlir.make_ir_context, threading.local(), itertools.count()

    def shared():
        if next(turn) % lowerings == 0 or not hasattr(made, "context"):
            made.context = make()
        return made.context

    mlir.make_ir_context = shared


if version("jax").startswith("0.10."):
    from jax._src.interpreters import mlir

    share_contexts(100)


@pytest.fixture(autouse=True)
def quick_pages(monkeypatch, request) -> None:
    """Leaves the curves out of the pages of runs, whose drawing takes longer than a tiny stage."""
    page = sys.modules.get("beagle_jax.training.page")
    if page is not None and request.path.name != "test_run_page.py":
        monkeypatch.setattr(page, "_svg", lambda *_: "")


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
    """Returns the environment of a subprocess with this many virtual devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


ONE_DEVICE = make_mesh(MeshConfig(), jax.devices()[:1])

TINY = TargetSpec(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope_theta=10000.0,
    rms_norm_eps=1e-5,
    max_positions=256,
    tie_embeddings=True,
)


def random_params(spec: TargetSpec, seed: int = 0, std: float = 0.3) -> dict:
    """Makes random target weights with norms near one.

    std is large, so that logits differ clearly between tokens.
    """
    rng = np.random.default_rng(seed)
    params: dict = {"layers": [{} for _ in range(spec.num_layers)]}
    for path, shape in param_table(spec).values():
        node = params
        for key in path[:-1]:
            node = node[key]
        center = 1.0 if len(shape) == 1 else 0.0
        node[path[-1]] = jnp.asarray(center + std * rng.standard_normal(shape), jnp.float32)
    return params


def slow_but(quick: Container[str], cases: Iterable[str]) -> list:
    """Parameters of a test: the quick ones run always, the others in the slow runs.

    cases: names, or values by name.
    """
    values = cases if isinstance(cases, Mapping) else {name: name for name in cases}
    return [
        pytest.param(value, id=name, marks=() if name in quick else pytest.mark.slow)
        for name, value in values.items()
    ]


# Files that take ten seconds or more, the longest begun first, so that two workers end together
# (launch/test.sh keeps the order of the files).
LONGEST = (
    "test_decoding",
    "test_families",
    "test_audit",
    "test_decoder",
    "test_writer",
    "test_sampling",
    "test_resume",
    "test_request_sampling",
    "test_batches",
    "test_state_layers",
    "test_serve",
    "test_engine",
    "test_train_step",
    "test_joined",
    "test_late",
    "test_eagle3_decoding",
    "test_command_decoding",
    "test_frozen",
    "test_readme",
    "test_decoding_mesh",
    "test_eagle3_training",
    "test_eagle_training",
    "test_quantised_forms",
    "test_state_layers_command",
    "test_toy_drafter",
    "test_sharding",
    "test_eagle_decoding",
    "test_torch_decoding",
    "test_tuning",
    "test_mutations",
    "test_optimizer",
    "test_gguf_families",
    "test_target",
    "test_convert",
    "test_mesh_states",
    "test_prepare",
    "test_spoiled_rows",
    "test_loop",
    "test_packing",
    "test_serve_safety",
    "test_experts",
    "test_quantised",
    "test_plan",
    "test_terminal",
    "test_plots",
    "test_ema",
    "test_float16",
    "test_attention",
)


def pytest_configure() -> None:
    """Switches garbage collection off during imports, which leave nothing to collect."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Lets the garbage collector skip what was imported and run less often.

    Imported objects stay, and tracing makes many objects that live for a second.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    gc.enable()


def slow_cases() -> set[str]:
    """The cases of slow_cases.txt, by file and name."""
    lines = (Path(__file__).parent / "slow_cases.txt").read_text(encoding="utf-8").splitlines()
    return {line for line in lines if not line.startswith("#")}


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marks
def pytest_collection_modifyitems(items) -> None:
    slow = slow_cases()
    for item in items:
        if f"{item.path.name}::{item.nodeid.partition('::')[2]}" in slow:
            item.add_marker(pytest.mark.slow)
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


_ended = itertools.count(1)


terminal.listen()  # as commands do: what lower floors log is printed
logging.getLogger("beagle_jax").propagate = True  # to `caplog`


@pytest.fixture(autouse=True)
def forget_programs():
    """Drops compiled programs when the process holds more than 10,000 memory maps.

    A compiled program takes ten maps or more and two megabytes. Linux gives a process 65,530 maps;
    10,000 of them are 2.4 GB in all. Counting them takes ten milliseconds, so only every twentieth
    test does it.
    """
    yield
    maps = Path("/proc/self/maps")
    if next(_ended) % 20 == 0 and maps.exists() and len(maps.read_text().splitlines()) > 10_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def shared_steps():
    """Lets runs of a stage share one compiled step if they compute the same.

    The run's folder and the settings of its other stage do not change the step.
    """
    from beagle_jax.training import loop

    made = lru_cache(loop.make_steps)

    def alike(config):
        return config.changed(
            folder="",
            seed=0,
            early=EarlyStage(steps=0),  # a multiple of any number of batches
            late=LateStage(steps=0),
            checkpoint_every=1,
            accept_changes=False,
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            loop,
            "make_steps",
            lambda spec, config, stage, *rest, **named: made(
                spec, alike(config), stage, *rest, **named
            ),
        )
        yield


@pytest.fixture
def at_the_root(monkeypatch):
    """Runs the test at the project's root, from which its files name each other."""
    monkeypatch.chdir(Path(__file__).resolve().parent.parent)


@pytest.fixture(scope="session")
def tiny_params() -> dict:
    return random_params(TINY)


@pytest.fixture(scope="session")
def frozen(tiny_params) -> FrozenTarget:
    """What training reads of the tiny target, whose head is its embedding."""
    return FrozenTarget(tiny_params["embed_VD"], tiny_params["embed_VD"])


@pytest.fixture(scope="session")
def tiny_draft_spec() -> BeagleSpec:
    return BeagleSpec.from_target(TINY, init_std=0.3)


@pytest.fixture(scope="session")
def tiny_draft(tiny_draft_spec) -> dict:
    return init_draft(tiny_draft_spec, jax.random.key(1))
