"""Loads what `convert to-speculators` writes with speculators itself, and compares the logits.

    python benchmarks/speculators_form.py

The first run makes an environment for speculators (`--env`, by default .venv-speculators): some
minutes and 2 GB, since its package needs the libraries of its trainer. Tiny random EAGLE-3 drafts
of several forms are written beside a tiny target. speculators loads each with its config and model
classes and computes the logits of two draft steps (training-time test); this library computes the
same with its JAX block. Prints the largest difference of each as a share of the largest logit; the
exit status is 1 if one exceeds 1e-5, or if a planted bug does not.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

VERSION = "0.9.0"
MISFITS = ("torchvision", "torchaudio")  # not needed; their builds may not fit torch's
TOLERANCE = 1e-5
LENGTH = 12
FORMS = {  # settings of the drafts beyond the plain form
    "plain": {},
    "Qwen3, norms and biases": {
        "norm_before_residual": True,
        "norm_before_fc": True,
        "norm_output": True,
        "qk_norm": True,
        "attention_bias": True,
        "state_layers": (0, 2),
    },
    "Llama, a norm for each stream": {"fc_norm": True, "head_dim": 10, "rope_theta": 5e5},
}


def make_environment(folder: Path) -> Path:
    """Returns the Python of an environment with speculators; installs it first if missing."""
    python = folder / "bin" / "python"
    if not list(folder.glob("lib/python*/site-packages/speculators")):
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        subprocess.run([*pip, "install", f"speculators=={VERSION}"], check=True)
        subprocess.run([*pip, "uninstall", "--yes", *MISFITS], check=True)
    return python


def write_inputs(folder: Path) -> list[str]:
    """Writes a target, a draft of each form, its inputs and expected logits; returns the folders.

    The last is a planted bug: the config of the second form says another `norm_before_residual`.
    """
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from beagle_jax.model.target import TargetSpec
    from beagle_jax.weights.server_files import write_published
    from beagle_jax.weights.server_form import Server

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=8, num_attention_heads=4)
    config = LlamaConfig(vocab_size=61, num_key_value_heads=2, **sizes, initializer_range=0.3)
    LlamaForCausalLM(config).save_pretrained(folder / "target")
    settings = json.loads((folder / "target" / "config.json").read_text())
    target = TargetSpec.from_hf_config(settings, "tiny")
    server = Server("speculators", {"name_or_path": str(folder / "target")})
    names = []
    for number, (name, changes) in enumerate(FORMS.items()):
        out = folder / name
        out.mkdir()
        draft = random_draft(target, changes, number)
        write_published(out, draft, target, server)
        rng = np.random.default_rng(number)
        inputs = {
            "tokens": rng.integers(0, 61, LENGTH + 2),
            "taps": rng.standard_normal((1, LENGTH, draft.spec.input_width), np.float32),
        }
        np.savez(out / "inputs.npz", **inputs, **expected_logits(folder, draft, **inputs))
        names.append(name)
    wrong = folder / "planted bug"
    subprocess.run(["cp", "-r", folder / names[1], wrong], check=True)
    changed = json.loads((wrong / "config.json").read_text()) | {"norm_before_residual": False}
    (wrong / "config.json").write_text(json.dumps(changed))
    return [*names, wrong.name]


def random_draft(target, changes: dict, seed: int):
    """Returns an EAGLE-3 draft of 40 tokens, every parameter random."""
    from dataclasses import replace

    import jax
    import jax.numpy as jnp
    import numpy as np

    from beagle_jax.model.eagle3 import Eagle3Spec, init_eagle3
    from beagle_jax.weights.draft import Draft

    spec = replace(Eagle3Spec.from_target(target, init_std=0.15), draft_vocab_size=40, **changes)
    rng = np.random.default_rng(seed)
    params = {
        name: jnp.asarray(array + 0.3 * rng.standard_normal(array.shape) * (array.ndim == 1))
        for name, array in init_eagle3(spec, jax.random.key(seed)).items()
    }
    hot_ids = np.sort(rng.permutation(target.vocab_size)[:40]).astype(np.int32)
    return Draft(spec, params, hot_ids, {"target": "tiny"})


def expected_logits(folder: Path, draft, tokens, taps) -> dict:
    """Returns this library's logits of two draft steps at every position.

    Entry t of the first step has token t + 1 and the target's streams at t; in the second step,
    token t + 2 and the first step's state at t. It sees the first step's entries up to t, and
    itself.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from safetensors.numpy import load_file

    from beagle_jax.model.eagle3 import Eagle3Block

    params, spec = draft.params, draft.spec
    embed_VD = load_file(folder / "target" / "model.safetensors")["model.embed_tokens.weight"]
    at_BT = jnp.arange(LENGTH)[None]
    before_TT = np.tri(LENGTH, dtype=bool)

    def of(method, *inputs):
        return Eagle3Block(spec).apply({"params": params}, *inputs, method=method)

    def logits(state_BTD):
        normed_BTD = spec.final_norm(params, state_BTD)
        return np.asarray(jnp.einsum("BTD,VD->BTV", normed_BTD, params["head_VD"]))

    with jax.default_matmul_precision("highest"):
        first = of("fuse", embed_VD[tokens[None, 1:-1]], of("features", taps))
        state_BTD = of("__call__", first, first, before_TT[None], at_BT, at_BT)
        second = of("fuse", embed_VD[tokens[None, 2:]], of("carried", state_BTD))
        sees_TS = np.concatenate([before_TT, np.eye(LENGTH, dtype=bool)], axis=1)
        rows = jnp.concatenate([first, second], axis=1)
        at_BS = jnp.concatenate([at_BT, at_BT + 1], axis=1)
        again_BTD = of("__call__", second, rows, sees_TS[None], at_BT + 1, at_BS)
    return {"first": logits(state_BTD), "second": logits(again_BTD)}


def inside(folder: Path, names: list[str]) -> dict[str, float]:
    """Runs in speculators' environment: returns the largest difference of each draft's logits."""
    import numpy as np
    import torch
    from safetensors.torch import load_file
    from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig

    embed_VD = load_file(folder / "target" / "model.safetensors")["model.embed_tokens.weight"]
    differences = {}
    for name in names:
        config = Eagle3SpeculatorConfig.from_pretrained(folder / name)
        config.transformer_layer_config._attn_implementation = "eager"
        model = Eagle3DraftModel.from_pretrained(folder / name, config=config).eval()
        model.load_verifier_weights()
        # What no file holds lies in memory as from_pretrained left it: the embedding, which
        # speculators reads from the target only where it is NaN, and rotary buffers.
        with torch.no_grad():
            model.embed_tokens.weight.copy_(embed_VD)
        model.rotary_emb = Eagle3DraftModel(config).rotary_emb
        held = np.load(folder / name / "inputs.npz")
        steps: list[torch.Tensor] = []
        model.lm_head.register_forward_hook(
            lambda _, inputs, output, steps=steps: steps.append(output)
        )
        tokens = torch.from_numpy(held["tokens"])[None]
        with torch.no_grad():
            model(
                hidden_states=torch.from_numpy(held["taps"]),
                input_ids=tokens[:, 1:-1],
                document_ids=torch.zeros(1, LENGTH, dtype=torch.long),
                ttt_steps=2,
            )
        expected = [held["first"], held["second"][:, :-1]]  # the last has no token there
        actual = [steps[0].numpy(), steps[1][:, :-1].numpy()]
        differences[name] = max(
            float(np.abs(a - b).max() / np.abs(b).max())
            for a, b in zip(actual, expected, strict=True)
        )
    return differences


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    root = Path(__file__).resolve().parent.parent
    parser.add_argument("--env", type=Path, default=root / ".venv-speculators")
    parser.add_argument("--inside", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        print(json.dumps(inside(Path(arguments.inside[0]), arguments.inside[1:])))
        return 0
    python = make_environment(arguments.env.absolute())
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as place:
        names = write_inputs(Path(place))
        command = [python, Path(__file__).resolve(), "--inside", place, *names]
        done = subprocess.run(command, env=clean, check=True, stdout=subprocess.PIPE, text=True)
    differences = json.loads(done.stdout.splitlines()[-1])
    for name, difference in differences.items():
        print(f"{difference:.1e}  {name}")
    *right, bug = differences.values()
    return 0 if max(right) <= TOLERANCE < bug else 1


if __name__ == "__main__":
    sys.exit(main())
