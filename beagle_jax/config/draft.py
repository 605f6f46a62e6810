"""Section `draft`: the drafter that decoding uses, and the start of a new one."""

from typing import Literal, Self

from pydantic import model_validator

from beagle_jax.config.section import Listed, Number, Section, refusal, setting
from beagle_jax.config.shipped import shipped_drafts
from beagle_jax.errors import UsageError
from beagle_jax.remote import fetch


class DraftConfig(Section):
    """The drafter that decoding uses, and how a new one begins."""

    path: str | None = setting(
        None,
        "folder of a trained draft; hf:org/name[@revision]; or the name of a draft that comes with "
        "the package; lookup: prompt lookup, which copies from earlier text; null: "
        "<train.folder>/draft",
        path="input",
    )
    kind: Literal["beagle", "eagle", "eagle3"] = setting(
        "beagle",
        "kind of draft to train; a trained draft stores its own kind",
        affects=("stage",),
    )
    init: str = setting(
        "normal",
        "initial weights; normal: random; ridge: a closed-form solution (training/warm_start.py); "
        "or a draft to continue from, as in `path`",
        affects=("stage",),
        path="input",
    )
    init_std: Number = setting(
        0.02,
        "standard deviation of the initial linear weights (method.md 2.4)",
        affects=("stage",),
        ge=0,
    )
    hot_tokens: int = setting(
        0,
        "number of tokens that the draft scores, the most frequent ones of answers; 0: all "
        "(method.md 3.2)",
        affects=("stage",),
        ge=0,
    )

    state_layers: Listed[int] | None = setting(
        None,
        "streams of the target that the draft reads, by the layer that each enters (0: the "
        "embedding). Beagle reads them beside the target's states; null: the states alone "
        "(method.md 15). EAGLE-3 reads them alone; the number of layers is the last output; null: "
        "2, L // 2, L - 3 (method.md 14)",
        affects=("stage",),
    )
    num_heads: int | None = setting(
        None, "number of query heads; null: the target's", affects=("stage",), ge=1
    )
    num_kv_heads: int | None = setting(
        None, "number of key/value heads; null: the target's", affects=("stage",), ge=1
    )
    head_dim: int | None = setting(
        None, "width of a head, even; null: the target's", affects=("stage",), ge=2
    )
    intermediate_size: int | None = setting(
        None, "inner width of the MLP; null: the target's", affects=("stage",), ge=1
    )
    fc_bias: bool = setting(
        True,
        "EAGLE: the fusion layer has a bias; vLLM drops one without a word, so set it to false for "
        "a draft that vLLM serves",
        affects=("stage",),
    )

    @model_validator(mode="after")
    def _check_layers(self) -> Self:
        layers = self.state_layers
        if layers is None:
            return self
        if self.kind == "eagle":
            raise refusal(
                f"{{at}}state_layers is {list(layers)}, but a draft of kind {self.kind} reads the "
                "target's last states; leave it out, or set {at}kind to eagle3 or beagle"
            )
        if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0:
            raise refusal(
                f"{{at}}state_layers is {list(layers)}; expected layers of the target in ascending "
                "order, each once"
            )
        return self

    @model_validator(mode="after")
    def _check_width(self) -> Self:
        if self.head_dim is not None and self.head_dim % 2:
            raise refusal(
                f"{{at}}head_dim is {self.head_dim}; expected an even number, as positions rotate "
                "pairs"
            )
        return self

    @model_validator(mode="after")
    def _check_bias(self) -> Self:
        if not self.fc_bias and self.kind != "eagle":
            raise refusal(
                f"{{at}}fc_bias is false, but a draft of kind {self.kind} has no such bias; leave "
                "it out"
            )
        return self

    def check_init(self) -> None:
        """Checks that training can start from `init`. Only commands that train need that folder.

        Raises:
            UsageError: `init` is neither a known word nor the folder of a trained draft.
        """
        if self.init in ("normal", "ridge", *shipped_drafts()) or self.init.startswith("hf:"):
            return
        if not (fetch(self.init) / "config.json").exists():
            raise UsageError(
                f"draft.init is {self.init!r}; expected normal, ridge or the folder of a trained "
                "draft"
            )
