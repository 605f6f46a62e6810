"""Writes the model card of an exported draft from its config and an evaluation.

A fact that neither holds is named as missing.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from beagle_jax import __version__
from beagle_jax.weights.draft import Draft
from beagle_jax.weights.kinds import torch_form

TRAINED_WITH = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
    "safetensors",
    "numpy",
)
EXPORTED_WITH = ("torch", "transformers", "jax", "safetensors", "numpy")

_MISSING = "not recorded"
_DISTANCES = {  # value of `train.loss` -> words of the card
    "cross_entropy": "Soft cross-entropy with",
    "kl": "Kullback-Leibler divergence from",
    "reverse_kl": "Reverse Kullback-Leibler divergence from",
    "total_variation": "Total variation distance to",
    "lk_hybrid": "LK hybrid (Kullback-Leibler, then total variation) distance to",
}
_DATA_FACTS = (
    "source",
    "rows",
    "answer_tokens_written",
    "max_prompt_tokens",
    "max_answer_tokens",
    "temperature",
    "seed",
)
_TRAINING_FACTS = ("seed", "batch", "row_tokens", "noise", "noise_scale", "optimizer", "clip_norm")
_TOLD_ELSEWHERE = ("target", "target_revision", "draft", "data", "training", "versions")


def installed(packages: tuple[str, ...]) -> dict[str, str]:
    """Returns the versions of beagle_jax and of those packages that are installed."""
    versions = {"beagle_jax": __version__}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def model_card(draft: Draft, measured: str | None = None, revision: str | None = None) -> str:
    """Returns the README.md of the exported folder.

    Args:
      draft: the exported draft.
      measured: the table of results, from `evaluation.pages.acceptance`.
      revision: the target's current revision. It is named for drafts that do not record the
        revision they were trained on.
    """
    provenance = draft.provenance
    data, training = provenance.get("data") or {}, provenance.get("training") or {}
    base = str(provenance.get("target") or "")
    name, _, source_revision = base.removeprefix("hf:").partition("@")
    trained_on = provenance.get("target_revision") or source_revision or _MISSING
    return _CARD.format(
        **torch_form(draft.spec.kind)._asdict(),
        base_model=f"base_model: {name}\n" if base.startswith("hf:") else "",
        target=base or _MISSING,
        revision=trained_on
        if trained_on != _MISSING or not revision
        else f"{_MISSING} in training; {revision} when exported",
        count=sum(int(np.prod(shape)) for shape in draft.spec.param_shapes().values()),
        scored="all tokens"
        if draft.hot_ids is None
        else f"the {len(draft.hot_ids):,} tokens listed in `hot_tokens`",
        data=_facts(data, _DATA_FACTS),
        training=_facts(training, _TRAINING_FACTS),
        stages=_stages(training),
        losses=_losses(training),
        results=measured or _MEASURE_IT,
        more=_other_facts(provenance),
        libraries=_pairs(provenance.get("versions") or {}) or _MISSING,
        checked=_pairs(installed(EXPORTED_WITH)),
    )


def _pairs(section: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in section.items())


def _facts(section: dict[str, Any], keys: tuple[str, ...]) -> str:
    return _pairs({key: section[key] for key in keys if key in section}) or _MISSING


def _stages(training: dict[str, Any]) -> str:
    lines = [
        f"- {name}: {_pairs(value)}"
        for name, value in training.items()
        if isinstance(value, dict) and "steps" in value
    ]
    return "\n".join(lines) or f"- {_MISSING}"


def _losses(training: dict[str, Any]) -> str:
    """Describes the training losses (method.md 3.2, 4.2)."""
    if "vloss_weight" not in training:
        return _MISSING
    kind = training.get("loss", "cross_entropy")  # the only loss of older versions
    lines = [
        f"{_DISTANCES.get(kind, kind)} the target's distribution, plus "
        f"{training['vloss_weight']} times the smooth-L1 distance to its states, both per "
        "supervised token."
    ]
    late = training.get("late") or training.get("test_time")
    if isinstance(late, dict) and late.get("steps"):
        steps = late.get("simulation_steps", _MISSING)
        weights, decay = late.get("step_weights"), late.get("step_decay")
        if not weights and isinstance(steps, int):
            falling = range(steps, 0, -1)
            weights = list(falling) if decay is None else [decay**step for step in range(steps)]
        rest = ", of all that is left of its window" if late.get("multi_token") else ""
        lines.append(
            f"In the late stage at each of {steps} simulated draft steps{rest}, weighted "
            f"{weights or _MISSING}."
        )
    return " ".join(lines)


_MEASURE_IT = (
    f"{_MISSING}: `python -m beagle_jax.evaluate --json FILE` measures it, and `convert "
    "to-torch --report FILE` writes it here"
)


def _other_facts(provenance: dict[str, Any]) -> str:
    """Lists the facts outside the sections that `train` writes, one per line."""
    return "".join(
        f"- {key}: {value}\n" for key, value in provenance.items() if key not in _TOLD_ELSEWHERE
    )


_CARD = """\
---
library_name: transformers
tags: [speculative-decoding, {tag}]
{base_model}---

# {title} draft for `{target}`

{description} of {count:,} parameters that drafts for a frozen target ({paper}); it scores {scored}.
It works with this target only, whose tokenizer, embedding and head it uses; none of them is
stored here.

```python
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

draft = AutoModel.from_pretrained("this folder", trust_remote_code=True)
target = AutoModelForCausalLM.from_pretrained("the target", dtype="float32")
tokenizer = AutoTokenizer.from_pretrained("the target")
prompt = tokenizer("Why is the sky blue?", return_tensors="pt")
answer = draft.generate(target, prompt.input_ids, max_new_tokens=64, levels=3)
print(tokenizer.decode(answer.sequences[0]), answer.rounds)
```

`generate` is lossless: it writes what the target alone would write, greedily or drawn
(`temperature`). It takes batches (`attention_mask`), chains (`levels`), static trees (`paths`) and
EAGLE-2's (`dynamic`). It is kept short, not fast.

## Target

`{target}`, revision {revision}

## Data

{data}

## Training

{training}

{stages}
{more}
### Losses

{losses}

## Acceptance

tau: tokens per round, one for plain decoding.

{results}

## Versions

Trained with: {libraries}. Exported with, and compared with the JAX block under: {checked}.

## Licence

{code} Apache-2.0, as beagle_jax is. The weights learnt from the target's states and from the data
above: the licences of both, which this folder does not record, say what may be done with them.
"""
