"""Section `draft`: the drafter that decoding uses, and the start of a new one."""

from pathlib import Path
from typing import Literal

from beagle_jax.config.section import Number, Section, setting
from beagle_jax.errors import UsageError


class DraftConfig(Section):
    """The drafter that decoding uses, and how a new one begins."""

    path: str | None = setting(
        None,
        "folder of a trained draft; lookup: prompt lookup, which copies from earlier text; null: "
        "<train.folder>/draft",
        path="input",
    )
    kind: Literal["beagle", "eagle"] = setting(
        "beagle",
        "kind of draft to train; a trained draft stores its own kind",
        affects=("stage",),
    )
    init: str = setting(
        "normal",
        "initial weights; normal: random; ridge: a closed-form solution (training/warm_start.py); "
        "or the folder of a draft to continue from",
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

    def check_init(self) -> None:
        """Checks that training can start from `init`. Only commands that train need that folder.

        Raises:
            UsageError: `init` is neither a known word nor the folder of a trained draft.
        """
        if self.init not in ("normal", "ridge") and not Path(self.init, "config.json").exists():
            raise UsageError(
                f"draft.init is {self.init!r}; expected normal, ridge or the folder of a trained "
                "draft"
            )
