"""EAGLE-3 drafts in the forms of SafeAILab's EAGLE, SGLang, vLLM and speculators (method.md 14).

The draft's tokens are written in ascending order, as the authors' are: readers that take the
target's rows by `t2d` rely on it.
"""

from typing import Any, cast

import numpy as np

from beagle_jax.arrays import AnyArray
from beagle_jax.model.eagle3 import Eagle3Spec
from beagle_jax.model.target import TargetSpec
from beagle_jax.weights.draft import Draft
from beagle_jax.weights.kinds import FILES
from beagle_jax.weights.server_form import (
    Form,
    Server,
    layer_config,
    misfits,
    published_tensors,
    refuse,
    rope_scaling,
    settings_of,
)

_NAMES = FILES[Eagle3Spec.kind].tensors
_LAYERS = "eagle_aux_hidden_state_layer_ids"
# Switches that a server's loader does not have.
_UNKNOWN = {
    "safeailab": (
        "attention_bias",
        "qk_norm",
        "norm_before_residual",
        "norm_before_fc",
        "fc_norm",
        "norm_output",
    ),
    "sglang": ("qk_norm", "norm_before_residual"),
    "vllm": ("qk_norm",),
    "speculators": (),
}


def eagle3_form(draft: Draft, target: TargetSpec, server: Server) -> Form:
    """Returns a draft as a server's folder holds it.

    Raises:
      UserError: the server's loader cannot express it. The message says why.
    """
    spec = cast(Eagle3Spec, draft.spec)
    scaling, no_scaling = rope_scaling(spec.rope_scaling, server)
    refuse(server, [*_reasons(draft, spec, target, server), *misfits(spec, server), no_scaling])
    params, hot_ids = _ascending(draft)
    layer = layer_config(spec, target)
    layer |= {"rope_scaling": scaling} if scaling else {}
    layer |= {"attention_bias": True} if spec.attention_bias else {}
    config = _CONFIGS[server.name](spec, layer, target, server)
    prefix = "midlayer." if server.name in ("safeailab", "sglang") else "layers.0."
    tensors = published_tensors(params, _NAMES, prefix)
    if spec.fc_norm:
        norms = np.split(tensors.pop("fc_norm.weight"), len(spec.taps))
        tensors |= {f"fc_norm.{at}.weight": norm.copy() for at, norm in enumerate(norms)}
    if hot_ids is not None:
        scored_V = np.zeros(target.vocab_size, bool)
        scored_V[hot_ids] = True
        tensors |= {"d2t": hot_ids.astype(np.int64) - np.arange(len(hot_ids)), "t2d": scored_V}
    return Form(config, tensors, params, hot_ids, settings_of(spec))


def _reasons(draft: Draft, spec: Eagle3Spec, target: TargetSpec, server: Server) -> list[str]:
    name, taps = server.name, spec.taps
    reasons = [
        f"it has {switch}, which {server.title} does not compute"
        for switch in _UNKNOWN[name]
        if getattr(spec, switch)
    ]
    if spec.fc_bias:
        reasons.append(
            "its fusion layer has a bias (fc.bias), which the loader drops, or takes only with "
            "biases of the attention"
        )
    if spec.norm_before_fc and spec.fc_norm:
        reasons.append("it has both norm_before_fc and fc_norm; the loader takes one")
    if list(taps) != sorted(set(taps)):
        reasons.append(f"it reads the streams {list(taps)}, and the loader orders them by layer")
    if name == "safeailab" and taps != Eagle3Spec.from_target(target).taps:
        reasons.append(
            f"it reads the streams {list(taps)}, and SafeAILab's code reads "
            f"{list(Eagle3Spec.from_target(target).taps)} whatever the config says"
        )
    if name == "sglang" and 0 in taps:
        reasons.append("it reads the embedding (stream 0), and SGLang names outputs of layers")
    if not spec.own_head and (name in ("safeailab", "speculators") or draft.hot_ids is not None):
        reasons.append(
            "it scores by rows of the target's head, and the loader wants a head of the draft's own"
        )
    other_width = spec.hidden_size != spec.target_hidden_size
    if spec.own_embedding and not other_width and name == "sglang":
        reasons.append("it has an embedding of its own, which SGLang replaces by the target's")
    if other_width and name == "speculators":
        reasons.append(
            f"it is {spec.hidden_size} wide and the target {spec.target_hidden_size}, which "
            "speculators' model refuses"
        )
    return reasons


def _ascending(draft: Draft) -> tuple[dict[str, AnyArray], np.ndarray | None]:
    """Returns parameters and scored tokens, these in ascending order."""
    params: dict[str, AnyArray] = dict(draft.params)
    if draft.hot_ids is None:
        return params, None
    order = np.argsort(np.asarray(draft.hot_ids))
    params["head_VD"] = np.asarray(params["head_VD"])[order]
    return params, np.asarray(draft.hot_ids)[order].astype(np.int32)


def _safeailab(
    spec: Eagle3Spec, layer: dict[str, Any], target: TargetSpec, server: Server
) -> dict[str, Any]:
    config = {
        **layer,
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": spec.draft_vocab_size,
    }
    # Where this key stands, the file must hold an embedding.
    other_width = spec.hidden_size != spec.target_hidden_size
    return config | ({"target_hidden_size": spec.target_hidden_size} if other_width else {})


def _switches(spec: Eagle3Spec, *names: str) -> dict[str, bool]:
    return {name: True for name in names if getattr(spec, name)}


def _sglang(
    spec: Eagle3Spec, layer: dict[str, Any], target: TargetSpec, server: Server
) -> dict[str, Any]:
    config = _safeailab(spec, layer, target, server)
    config["draft_vocab_size"] = spec.draft_vocab_size if spec.own_head else None
    return config | {
        "num_aux_hidden_states": len(spec.taps),
        "eagle_config": {  # outputs of these layers
            "use_aux_hidden_state": True,
            _LAYERS: [tap - 1 for tap in spec.taps],
        },
        **_switches(spec, "norm_before_fc", "fc_norm", "norm_output"),
    }


def _vllm(
    spec: Eagle3Spec, layer: dict[str, Any], target: TargetSpec, server: Server
) -> dict[str, Any]:
    return _safeailab(spec, layer, target, server) | {
        "num_aux_hidden_states": len(spec.taps),  # a list alone does not resize fc
        _LAYERS: list(spec.taps),
        "norm_before_residual": spec.norm_before_residual,
        **_switches(spec, "norm_before_fc", "fc_norm", "norm_output"),
    }


def _speculators(
    spec: Eagle3Spec, layer: dict[str, Any], target: TargetSpec, server: Server
) -> dict[str, Any]:
    model = {"model_type": "qwen3"} if spec.qk_norm else {}
    return {
        "speculators_model_type": "eagle3",
        "architectures": ["Eagle3Speculator"],
        "draft_vocab_size": spec.draft_vocab_size,
        # written whatever they are: readers have other defaults
        "norm_before_residual": spec.norm_before_residual,
        "norm_before_fc": spec.norm_before_fc,
        "norm_output": spec.norm_output,
        "fc_norm": spec.fc_norm,
        _LAYERS: list(spec.taps),
        "transformer_layer_config": {
            key: value
            for key, value in (layer | model).items()
            if key not in ("torch_dtype", "tie_word_embeddings")
        }
        # vLLM gives fc the width of three streams unless the layer's config says another number.
        | {"num_aux_hidden_states": len(spec.taps)},
        "torch_dtype": "float32",
        "tie_word_embeddings": False,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
            "verifier": {
                "name_or_path": server.verifier.get("name_or_path"),
                "architectures": list(server.verifier.get("architectures") or []),
            },
        },
    }


_CONFIGS = {"safeailab": _safeailab, "sglang": _sglang, "vllm": _vllm, "speculators": _speculators}
