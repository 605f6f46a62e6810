"""The files of each kind of draft: tensor names, PyTorch form and model card."""

from collections.abc import Mapping
from typing import NamedTuple

from beagle_jax.errors import UserError
from beagle_jax.model.draft import DraftSpec


class TorchForm(NamedTuple):
    """The PyTorch folder of a kind, and the text of its model card."""

    model_type: str  # differs from the native folder's, to tell the two formats apart
    modules: tuple[str, ...]  # copied beside the weights; the first holds the classes
    classes: str  # prefix of the class names
    title: str  # in the card: an article and the kind's name
    tag: str
    description: str
    paper: str
    code: str  # in the card: the modules, as the subject of a sentence


class KindFiles(NamedTuple):
    """How drafts of one kind are stored."""

    tensors: Mapping[str, str]  # parameter -> name in the file
    torch: TorchForm | None = None  # None: `convert to-torch` refuses the kind


LAYER_TENSORS = {
    "q_proj": "self_attn.q_proj.weight",
    "k_proj": "self_attn.k_proj.weight",
    "v_proj": "self_attn.v_proj.weight",
    "o_proj": "self_attn.o_proj.weight",
    "gate_proj": "mlp.gate_proj.weight",
    "up_proj": "mlp.up_proj.weight",
    "down_proj": "mlp.down_proj.weight",
    "input_layernorm": "input_layernorm.weight",
    "post_attention_layernorm": "post_attention_layernorm.weight",
}

# what drafts of all kinds decode with
_DECODING = ("modeling_decoding", "modeling_sampling", "modeling_tree")

FILES: dict[str, KindFiles] = {
    "beagle": KindFiles(
        {
            **LAYER_TENSORS,
            "k_layers": "self_attn.k_layers.weight",
            "v_layers": "self_attn.v_layers.weight",
        },
        TorchForm(
            model_type="beagle_draft_torch",
            modules=("modeling_beagle", *_DECODING),
            classes="Beagle",
            title="A Beagle",
            tag="beagle",
            description="One cross-attention block",
            paper="Beagle, arXiv 2505.24544",
            code="`modeling_beagle.py` and the modules beside it are",
        ),
    ),
    "eagle": KindFiles(
        {
            "fc": "fc.weight",
            "fc_bias": "fc.bias",
            "q_bias": "self_attn.q_proj.bias",
            "k_bias": "self_attn.k_proj.bias",
            "v_bias": "self_attn.v_proj.bias",
            **LAYER_TENSORS,
        },
        TorchForm(
            model_type="eagle_draft_torch",
            modules=("modeling_eagle", "modeling_beagle", *_DECODING),
            classes="Eagle",
            title="An EAGLE",
            tag="eagle",
            description="A fusion layer and one decoder layer",
            paper="EAGLE-1 and EAGLE-2, arXiv 2401.15077",
            code="`modeling_eagle.py` and the modules beside it are",
        ),
    ),
    "eagle3": KindFiles(
        {
            "fc": "fc.weight",
            "fc_bias": "fc.bias",
            "fc_input_norm": "input_norm.weight",
            "fc_norm": "fc_norm.weight",  # of all streams, one after another
            "q_bias": "self_attn.q_proj.bias",
            "k_bias": "self_attn.k_proj.bias",
            "v_bias": "self_attn.v_proj.bias",
            "o_bias": "self_attn.o_proj.bias",
            "q_norm": "self_attn.q_norm.weight",
            "k_norm": "self_attn.k_norm.weight",
            "hidden_norm": "hidden_norm.weight",
            "norm": "norm.weight",
            "head_VD": "lm_head.weight",
            "embed_VD": "embed_tokens.weight",
            **LAYER_TENSORS,
        }
    ),
}


def tensor_name(spec: DraftSpec, param: str) -> str:
    """Returns a parameter's name in the file, which is PyTorch's."""
    return FILES[spec.kind].tensors[param]


def torch_form(kind: str) -> TorchForm:
    """Returns the PyTorch form of a kind.

    Raises:
      UserError: the kind has none.
    """
    form = FILES[kind].torch
    if form is None:
        raise UserError(
            f"a draft of kind {kind!r} has no PyTorch form; expected one of "
            f"{', '.join(name for name, files in FILES.items() if files.torch)}"
        )
    return form


def kind_in_torch(model_type: object) -> str | None:
    """Returns the kind whose PyTorch config.json has this model_type, else None."""
    return next(
        (
            name
            for name, files in FILES.items()
            if files.torch and files.torch.model_type == model_type
        ),
        None,
    )
