"""Reads the config.json of a published EAGLE-3 draft (method.md 14).

SafeAILab's, SGLang's and vLLM's readers take one flat Llama config, SGLang's and SpecForge's with
some keys inside `eagle_config`; speculators' config describes the layer in
`transformer_layer_config`. Where a key means different things to them, and the folder does not show
whose it is, the key is refused.
"""

from pathlib import Path
from typing import Any, NamedTuple

from beagle_jax.errors import UserError
from beagle_jax.model.eagle3 import Eagle3Spec
from beagle_jax.model.layers import RopeFactors
from beagle_jax.model.target import TargetSpec

SPECULATORS = "eagle3"  # their speculators_model_type
_LAYERS = "eagle_aux_hidden_state_layer_ids"
_LAYER_MODELS = ("llama", "qwen3")  # of speculators' layer


class Eagle3Config(NamedTuple):
    """What a folder's config says."""

    spec: Eagle3Spec  # scores the whole vocabulary, with a head and without an embedding
    draft_vocab_size: int | None  # None: as many as the head has rows
    reading: str  # which of several meanings was taken; "" if there is only one


def read_eagle3_config(
    config: dict[str, Any], names: set[str], target: TargetSpec, source: Path
) -> Eagle3Config:
    """Reads a config.

    names: tensors of the folder, by their names in a native one.

    Raises:
      UserError: a setting is for another target, cannot be computed, or means different things to
        the readers of such folders. The message names it.
    """
    folder = _Folder(config, source)
    layer = folder.layer(names)
    folder.check_target(layer, target)
    rope_scaling = layer.rope_scaling
    if isinstance(rope_scaling, RopeFactors):
        raise UserError(f"{source}: config.json asks for factors of rotary frequencies")
    taps, reading = folder.state_layers(target)
    spec = Eagle3Spec(
        hidden_size=layer.hidden_size,
        intermediate_size=layer.intermediate_size,
        num_heads=layer.num_heads,
        num_kv_heads=layer.num_kv_heads,
        head_dim=layer.head_dim,
        rope_theta=layer.rope_theta,
        rms_norm_eps=layer.rms_norm_eps,
        embed_scale=target.embed_scale,
        target_hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        draft_vocab_size=target.vocab_size,
        state_layers=taps,
        rope_scaling=rope_scaling,
        attention_bias="self_attn.q_proj" in layer.biases,
        qk_norm=layer.qk_norm,
        fc_bias="fc.bias" in names,
        norm_before_residual=folder.before_residual(),
        norm_before_fc=folder.switch("norm_before_fc"),
        fc_norm=folder.switch("fc_norm") or folder.switch("use_aux_norm"),
        norm_output=folder.switch("norm_output"),
    )
    folder.check(spec, target, names)
    return Eagle3Config(spec, folder.count(target), reading)


class _Folder:
    """A config, and where it is from."""

    def __init__(self, config: dict[str, Any], source: Path):
        self._config, self._source = config, source
        self._speculators = config.get("speculators_model_type") == SPECULATORS
        nested = config.get("eagle_config")
        self._nested: dict[str, Any] = nested if isinstance(nested, dict) else {}

    def layer(self, names: set[str]) -> TargetSpec:
        """Describes the draft's one layer as a target of one layer."""
        where = f"{self._source}: config.json"
        if self._speculators:
            given = self._config.get("transformer_layer_config")
            if not isinstance(given, dict):
                raise UserError(
                    f"{where} lacks transformer_layer_config, which describes the layer"
                )
            where += ": transformer_layer_config"
            model = given.get("model_type")
            if model is None and not {"head_dim", "num_key_value_heads"} <= given.keys():
                raise UserError(
                    f"{where} has no model_type, which is qwen3 to speculators and llama to vLLM; "
                    "write model_type, or head_dim and num_key_value_heads, there"
                )
            if model is None:
                model = "qwen3" if "self_attn.q_norm.weight" in names else "llama"
            if model not in _LAYER_MODELS:
                raise UserError(
                    f"{where} has model_type {model!r}; expected {' or '.join(_LAYER_MODELS)}"
                )
        else:
            # The readers build Llama's layer, whatever model_type says, and one of it.
            given, model = self._config, "llama"
        layers = given.get("layer_types") or []
        if "sliding_attention" in layers or given.get("use_sliding_window"):
            raise UserError(
                f"{where} asks for a sliding window ({given.get('sliding_window')} tokens); this "
                "version drafts from all of the text"
            )
        if self._biased() and not self._speculators:
            given = {**given, "attention_bias": True}
        layer = TargetSpec.from_hf_config(
            {**given, "model_type": model, "num_hidden_layers": 1, "layer_types": None}, where
        )
        if any(name.startswith("mlp.") for name in layer.biases):
            raise UserError(f"{where} asks for mlp_bias; the EAGLE-3 draft has none")
        return layer

    def check_target(self, layer: TargetSpec, target: TargetSpec) -> None:
        """Raises UserError for a draft of another target."""
        width = self._config.get("target_hidden_size") or layer.hidden_size
        for key, theirs, ours in (
            ("hidden size of the target", width, target.hidden_size),
            ("vocab_size", layer.vocab_size, target.vocab_size),
        ):
            if theirs != ours:
                raise UserError(
                    f"{self._source}: this draft belongs to another target ({key} {theirs} there, "
                    f"{ours} here)"
                )

    def count(self, target: TargetSpec) -> int | None:
        """Reads how many tokens the draft scores; None if the config does not say it."""
        count = self._config.get("draft_vocab_size")
        if count is not None and (type(count) is not int or not 0 < count <= target.vocab_size):
            raise UserError(
                f"{self._source}: draft_vocab_size is {count!r}; expected a number up to the "
                f"target's {target.vocab_size}"
            )
        return count

    def _biased(self) -> bool:
        """SGLang gives the attention biases by either key."""
        return self._config.get("attention_bias") is True or self._config.get("bias") is True

    def switch(self, key: str) -> bool:
        """Reads a setting that is off if it is absent; `eagle_config` wins over the top level."""
        value = self._nested.get(key, self._config.get(key))
        if value not in (None, True, False):
            raise UserError(f"{self._source}: {key} is {value!r}; expected true or false")
        return value is True

    def before_residual(self) -> bool:
        """Reads `norm_before_residual`, whose default differs between speculators and vLLM."""
        if self._speculators and "norm_before_residual" not in self._config:
            raise UserError(
                f"{self._source}: config.json lacks norm_before_residual, which is false to "
                "speculators and true to vLLM; write there what the draft was trained with"
            )
        return self.switch("norm_before_residual")

    def state_layers(self, target: TargetSpec) -> tuple[tuple[int, ...], str]:
        """Returns the streams that the draft reads, and which reading of the list was taken.

        To vLLM and speculators, id i is the stream that enters layer i. SGLang and SpecForge read
        the list in `eagle_config`, and i is the output of layer i.
        """
        taps, reading = self._named_layers(target)
        if beyond := [tap for tap in taps if tap > target.num_layers]:
            raise UserError(
                f"{self._source}: this draft belongs to another target (it reads the streams "
                f"{beyond}, the target has 0 to {target.num_layers})"
            )
        return taps, reading

    def _named_layers(self, target: TargetSpec) -> tuple[tuple[int, ...], str]:
        top, nested = self._config.get(_LAYERS), self._nested.get(_LAYERS)
        entering = None if nested is None else self._checked(nested, 1)
        if top is not None:
            taps = self._checked(top, 0)
            if entering is not None and entering != taps:
                raise UserError(
                    f"{self._source}: {_LAYERS} is {top} (streams that enter these layers, to "
                    f"vLLM and speculators) and in eagle_config {nested} (outputs of these layers, "
                    "to SGLang); the two name other streams, leave one out"
                )
            return taps, ""
        if entering is not None:
            return entering, (
                f"eagle_config.{_LAYERS} {nested} was read as SGLang and SpecForge do, as outputs "
                f"of these layers (streams {list(entering)}); vLLM would read the streams that "
                "enter them"
            )
        return Eagle3Spec.from_target(target).taps, ""

    def _checked(self, layers: Any, more: int) -> tuple[int, ...]:
        if (
            not isinstance(layers, list)
            or not layers
            or any(type(layer) is not int or layer < 0 for layer in layers)
            or layers != sorted(set(layers))
        ):
            raise UserError(
                f"{self._source}: {_LAYERS} is {layers!r}; expected layers of the target in "
                "ascending order (readers do not agree on another)"
            )
        return tuple(layer + more for layer in layers)

    def check(self, spec: Eagle3Spec, target: TargetSpec, names: set[str]) -> None:
        """Raises UserError for what only some readers compute, and for contradictions."""
        if spec.norm_before_fc and spec.fc_norm:
            raise UserError(
                f"{self._source}: norm_before_fc and fc_norm are both set; expected one"
            )
        if spec.fc_bias and self._config.get("bias") is not True:
            raise UserError(
                f"{self._source}: holds fc.bias, and config.json does not say bias: true, without "
                "which every reader drops it"
            )
        if self._nested.get("use_aux_hidden_state") is False:
            raise UserError(
                f"{self._source}: eagle_config.use_aux_hidden_state is false: this draft reads the "
                "target's last states, which is not EAGLE-3"
            )
        self._check_tied(target, names)
        expected = self._config.get("num_aux_hidden_states")
        if expected not in (None, len(spec.state_layers)):
            raise UserError(
                f"{self._source}: num_aux_hidden_states is {expected}, but the draft reads "
                f"{len(spec.state_layers)} streams {list(spec.state_layers)}"
            )

    def _check_tied(self, target: TargetSpec, names: set[str]) -> None:
        """Raises UserError if the draft's head is an embedding that is not the target's head."""
        if self._speculators or self._config.get("tie_word_embeddings") is not True:
            return
        if "lm_head.weight" in names or "embed_tokens.weight" in names:
            raise UserError(
                f"{self._source}: tie_word_embeddings is true, by which SGLang takes the embedding "
                "as the head, and the folder holds an embedding or a head of its own, which other "
                "readers take; set it to false, or remove these tensors"
            )
        if not target.tie_embeddings:
            raise UserError(
                f"{self._source}: tie_word_embeddings is true, so that the embedding is the head, "
                "but the target has a head of its own; set it to false to take the target's head"
            )
