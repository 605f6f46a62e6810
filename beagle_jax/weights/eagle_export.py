"""EAGLE-1/2 drafts in the forms of SafeAILab's EAGLE, SGLang and vLLM (method.md 9.3)."""

from typing import cast

import numpy as np

from beagle_jax.arrays import AnyArray
from beagle_jax.model.eagle import EagleSpec
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

_NAMES = FILES[EagleSpec.kind].tensors


def eagle_form(draft: Draft, target: TargetSpec, server: Server) -> Form:
    """Returns a draft as a server's folder holds it.

    Raises:
      UserError: the server's loader cannot express it. The message says why.
    """
    spec = cast(EagleSpec, draft.spec)
    scaling, no_scaling = rope_scaling(spec.rope_scaling, server)
    refuse(server, [*_reasons(draft, spec, server), *misfits(spec, server), no_scaling])
    config = layer_config(spec, target)
    config["architectures"] = ["LlamaForCausalLM"]
    config |= {"rope_scaling": scaling} if scaling else {}
    params: dict[str, AnyArray] = dict(draft.params)
    if server.name == "safeailab":
        config |= {"bias": spec.fc_bias, "qkv_bias": spec.qkv_bias}
    if server.name == "vllm" and spec.qkv_bias:
        config["qkv_bias"] = True
    if server.name == "sglang":
        # Its attention has biases by a switch of the config for all four projections, or by the
        # architecture for three.
        family = "Qwen2" if spec.qkv_bias else "Llama"
        config["architectures"] = [f"{family}ForCausalLMEagle"]
        config["model_type"] = family.lower()
        # Its fc always has a bias, which stays random where the file has none.
        params.setdefault("fc_bias", np.zeros(spec.hidden_size, np.float32))
    settings = settings_of(spec, fc_bias="fc_bias" in params)
    return Form(config, published_tensors(params, _NAMES, "layers.0."), params, None, settings)


def _reasons(draft: Draft, spec: EagleSpec, server: Server) -> list[str]:
    reasons = []
    if server.name == "speculators":
        reasons.append("speculators and vLLM no longer load EAGLE-1/2 drafts in this form")
    if draft.hot_ids is not None:
        reasons.append(
            f"it scores {len(draft.hot_ids):,} of the target's tokens (draft.hot_tokens), and an "
            "EAGLE-1/2 draft scores all of them there; train one with draft.hot_tokens=0"
        )
    if spec.input_norm:
        reasons.append("it norms the inputs of its layer, and theirs has no input_layernorm")
    if server.name == "vllm" and spec.fc_bias:
        reasons.append(
            "its fusion layer has a bias (fc.bias), which vLLM drops without a word; train one "
            "with draft.fc_bias=false"
        )
    return reasons
