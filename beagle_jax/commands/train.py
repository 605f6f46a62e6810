"""Training from a config to an exported draft.

Text (written by the target if need be), target states, early stage, late stage, exported draft.
Each part is kept on disk and skipped when it is already there.
"""

import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from beagle_jax.config import Config, MeshConfig
from beagle_jax.corpus.fill import rows_and_states
from beagle_jax.data.chats import Chat
from beagle_jax.data.hot_tokens import coverage, hot_tokens
from beagle_jax.data.loader import BatchLoader
from beagle_jax.data.share import Share
from beagle_jax.data.source import check_source
from beagle_jax.data.states import StoredStates, states_in_memory
from beagle_jax.data.template import Row, supervised_tokens
from beagle_jax.decoding.build import decoder_of
from beagle_jax.decoding.sampling import sampling_of
from beagle_jax.errors import UserError
from beagle_jax.evaluation.measure import Measurement
from beagle_jax.evaluation.suites import suite, tokenize
from beagle_jax.model.draft import DraftSpec
from beagle_jax.model.kinds import fresh_params, spec_type
from beagle_jax.model.target import head
from beagle_jax.processes import host_copy, is_first
from beagle_jax.sharding import born, check_rows, make_mesh, place, share_of_rows
from beagle_jax.training.best import Best
from beagle_jax.training.frozen import FrozenTarget
from beagle_jax.training.kinds import WARM_STARTS
from beagle_jax.training.loop import check_settings, run_stage
from beagle_jax.training.metrics import Log, check_writers
from beagle_jax.training.warm_start import FIT_ROWS
from beagle_jax.weights.draft import Draft, load_draft, save_draft
from beagle_jax.weights.model_card import TRAINED_WITH, installed
from beagle_jax.weights.shape import check_shape
from beagle_jax.weights.target import Target, configured_target


def train_draft(config: Config, target: Target | None = None) -> dict:
    """Trains and exports to <train.folder>/draft; returns that folder, rows, answer tokens and the
    draft's vocabulary.

    target: what `training_target` gives, for a caller who needs it too; its layers then stay in
    memory.
    """
    mesh = make_mesh(config.mesh)
    check_rows(config.train.batch, mesh)
    share_of_rows(mesh)  # or refuses it
    prompts = check_beforehand(config)
    target = target or training_target(config)
    check_shape(config.target, target.spec)
    start = given_draft(config, target)
    rows, states = shuffled(config.data.seed, *rows_and_states(config, target))
    spec = (
        spec_type(config.draft.kind).from_target(target.spec, config.draft.init_std)
        if start is None
        else start.spec
    )
    hot_ids = draft_vocabulary(config, rows, target.spec.vocab_size)
    target_spec, made_with = target.spec, provenance(config, rows, target.revision)

    def draft_of(params, **more):
        return Draft(spec, params, hot_ids, made_with | more)

    best = best_draft(config, target, prompts, draft_of) if config.eval.every else None
    frozen = frozen_parts(target, hot_ids, online=states is None)
    if best is None:
        del target  # a caller who does not keep it gets the memory of its layers back here
    training, held_out = loaders(config, rows, states, mesh, taps=len(spec.taps))
    # No name here holds the first parameters, so that the second stage frees them.
    trained = train(
        config,
        spread(config, frozen, mesh, hot_ids),
        spec,
        first_params(config, frozen, spec, mesh, training, start),
        mesh,
        training,
        held_out,
        best,
    )
    draft = draft_of(host_copy(trained))
    folder = Path(config.train.folder) / "draft"
    if is_first():
        save_draft(
            folder,
            load_draft(_best_folder(config), target_spec, type(spec))
            if best is not None and best.tau
            else draft,
        )
    return {
        "draft": str(folder),
        "rows": len(rows),
        "answer_tokens": supervised_tokens(rows),
        "vocabulary": target_spec.vocab_size if hot_ids is None else len(hot_ids),
    }


def draft_vocabulary(config: Config, rows: list[Row], vocab_size: int) -> np.ndarray | None:
    """Ids of the tokens that the draft scores (`draft.hot_tokens`); None: all."""
    hot_ids = hot_tokens(rows, config.draft.hot_tokens, vocab_size)
    if hot_ids is not None:
        share = coverage(rows, hot_ids)
        print(f"draft vocabulary: {len(hot_ids)} tokens, {share:.1%} of the answers")
    return hot_ids


def training_target(config: Config) -> Target:
    """The target that writes text and states."""
    return configured_target(config.target, own_part(make_mesh(config.mesh)), decoding=False)


def check_beforehand(config: Config) -> list[Chat]:
    """The prompts of tau; none if it is not measured.

    Raises UserError, before the target is loaded and writes, for what is missing or of another run:
    packages, checkpoints, text, these prompts.
    """
    config.draft.check_init()
    check_writers(config)
    check_settings(config)
    check_source(config.data)
    return (
        suite(config.eval.suites[0], config.eval.train_prompts, config.eval.folder)
        if config.eval.every
        else []
    )


def own_part(mesh: Mesh) -> Mesh:
    """Where text and states are written: on the whole mesh, or, of several processes, by each on
    its own devices.
    """
    return (
        mesh
        if jax.process_count() == 1
        else make_mesh(MeshConfig(data=1, tensor=-1), jax.local_devices())
    )


def best_draft(
    config: Config, target: Target, prompts: Sequence[Chat], draft_of: Callable[..., Draft]
) -> Best:
    """Measures tau on these prompts, as `decode` decodes, and keeps the best draft in
    <train.folder>/best.
    """
    tokens = tokenize(prompts, target.tokenizer)

    def measure(params: dict) -> dict:
        decoder = decoder_of(
            config, target, draft_of({name: jnp.asarray(array) for name, array in params.items()})
        )
        answers = decoder.generate(
            tokens, sampling_of(config.decode), max_new_tokens=config.eval.max_new_tokens
        )
        measured = Measurement("draft", "", [[answer] for answer in answers])
        return {
            "tau": round(measured.tau, 4),
            "rounds": measured.rounds,
            "tokens": measured.tokens - len(answers),
        }  # the prefill's are in no round

    def keep(params, figures):
        return save_draft(_best_folder(config), draft_of(params, best=figures))

    return Best(Path(config.train.folder) / "best.json", config.eval, measure, keep)


def _best_folder(config: Config) -> Path:
    return Path(config.train.folder) / "best"


def shuffled(
    seed: int, rows: list[Row], states: list[StoredStates] | None
) -> tuple[list[Row], list[StoredStates] | None]:
    """All rows in a random order that depends on the seed alone, and the target's states of each if
    there are.
    """
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return [rows[index] for index in order], states and [states[index] for index in order]


def loaders(
    config: Config, rows: list[Row], states: list[StoredStates] | None, mesh: Mesh, *, taps: int
) -> tuple[BatchLoader, BatchLoader | None]:
    """Batches to train on, and of the last `log.eval_rows` rows, which only measure.

    Raises UserError when nothing is left to train on.
    """
    cut = len(rows) - config.log.eval_rows
    if cut < 1:
        raise UserError(
            f"log.eval_rows is {config.log.eval_rows}, but there are only {len(rows)} rows; "
            "lower it"
        )
    settings = dict(
        batch=config.train.batch,
        row_tokens=config.train.row_tokens,
        seed=config.train.seed,
        share=Share(*share_of_rows(mesh)),
        pack=config.train.pack,
        taps=taps,
    )
    training = BatchLoader(rows[:cut], states and states[:cut], **settings)
    held_out = (
        BatchLoader(rows[cut:], states and states[cut:], **settings | {"pack": False})
        if config.log.eval_rows
        else None
    )
    unpacked = f" ({training.padding_unpacked:.0%} without train.pack)" if config.train.pack else ""
    print(
        f"{cut - training.left_out} chats, {supervised_tokens(rows[:cut]):,} answer tokens, "
        f"{training.steps_per_epoch} steps an epoch; {training.padding:.0%} of the positions "
        f"are padding{unpacked}"
    )
    if training.left_out:
        print(
            f"left out {training.left_out} of {cut} chats without an answer in their first "
            f"{config.train.row_tokens} tokens (train.row_tokens)"
        )
    return training, held_out


def train(
    config: Config,
    frozen: FrozenTarget,
    spec: DraftSpec,
    params: dict[str, jax.Array],
    mesh: Mesh,
    training: BatchLoader,
    held_out: BatchLoader | None,
    best: Best | None,
) -> dict[str, jax.Array]:
    """Runs the stages that have steps, one after the other, from these parameters."""
    log = Log(config)
    log.write(
        {
            "stage": "data",
            "step": 0,
            "padding": round(training.padding, 4),
            "padding_unpacked": round(training.padding_unpacked, 4),
        }
    )
    for stage in config.train.stages_to_run:
        params = run_stage(stage, config, spec, params, frozen, mesh, training, held_out, log, best)
    log.close()
    return params


def frozen_parts(target: Target, hot_ids: np.ndarray | None, online: bool) -> FrozenTarget:
    """What training reads of this process's target. online: steps compute its states."""
    # With a reduced draft vocabulary both distributions of the loss are over it: it is all the
    # draft will ever score.
    head_VD = head(target.params) if hot_ids is None else head(target.params)[hot_ids]
    return FrozenTarget(
        embed_VD=target.params["embed_VD"],
        head_VD=head_VD,
        model=target.params if online else None,
        spec=target.spec if online else None,
    )


def spread(
    config: Config, frozen: FrozenTarget, mesh: Mesh, hot_ids: np.ndarray | None
) -> FrozenTarget:
    """The same over the mesh."""
    if jax.process_count() > 1 and frozen.model is not None:
        # The model is this process's alone; each reads its parts of the one that all share.
        shared = configured_target(config.target, mesh, decoding=False)
        return place(frozen_parts(shared, hot_ids, online=True), mesh)
    return place(jax.device_get(frozen) if jax.process_count() > 1 else frozen, mesh)


def given_draft(config: Config, target: Target) -> Draft | None:
    """The draft to go on from, if `draft.init` is a folder. Raises UserError unless it is of the
    kind that `draft.kind` says.
    """
    if config.draft.init in ("normal", "ridge"):
        return None
    return load_draft(config.draft.init, target.spec, spec_type(config.draft.kind))


def first_params(
    config: Config,
    frozen: FrozenTarget,
    spec: DraftSpec,
    mesh: Mesh,
    training: BatchLoader,
    start: Draft | None = None,
) -> dict[str, jax.Array]:
    """Where the first stage begins, spread over the mesh: `start`, or as `draft.init` says.

    frozen: on this process alone.
    """
    if start is not None:
        return place(start.params, mesh)
    fresh, key = partial(fresh_params, spec), jax.random.key(config.train.seed)
    if config.draft.init == "normal":
        return born(fresh, mesh, key)
    sample = training.sample(FIT_ROWS)
    if sample.inputs_BLI is None:
        inputs_BLI = states_in_memory(frozen.model, frozen.spec, sample.tokens_BL, sample.length_BC)
        sample = sample._replace(inputs_BLI=inputs_BLI)
    return place(WARM_STARTS[spec.kind](fresh(key), spec, frozen.embed_VD, sample), mesh)


def provenance(config: Config, rows: list[Row], revision: str | None) -> dict:
    """What the exported draft says of its training."""
    return {
        "target": config.target.source,
        "target_revision": revision,
        "draft": config.draft.model_dump(),
        "data": {
            **config.data.model_dump(),
            "rows": len(rows),
            "answer_tokens_written": supervised_tokens(rows),
        },
        "training": config.train.record(),
        "versions": installed(TRAINED_WITH),
    }
