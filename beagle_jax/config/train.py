"""Section `train`: the stages (method.md sections 3 to 5), and what they share."""

from collections import Counter
from typing import Any, Literal, Self

from pydantic import model_validator

from beagle_jax.config.section import Listed, Number, Section, refusal, setting
from beagle_jax.config.stage import AnyLateStage, AnyStage, EarlyStage, LateStage, StageConfig


class TrainConfig(Section):
    """The stages (method.md sections 3 to 5), and what they share."""

    folder: str = setting(
        "runs/train", "folder for checkpoints, log.jsonl and the exported draft", path="output"
    )
    seed: int = setting(
        42, "seed of initial weights, order of rows, offsets and noise", affects=("stage",)
    )
    batch: int = setting(
        16,
        "rows per step; a row is one chat, or several with pack",
        affects=("stage",),
        ge=1,
    )
    accumulate: int = setting(
        1,
        "batches whose gradients are summed for one update; every count of steps counts batches",
        affects=("stage",),
        ge=1,
    )
    row_tokens: int = setting(
        224, "L: length of a row in tokens; longer chats are cut", affects=("stage",), ge=1
    )
    pack: bool = setting(
        False,
        "put as many whole chats into a row as fit; no chat attends to another",
        affects=("stage",),
    )
    noise: Literal["uniform", "gaussian", "none"] = setting(
        "uniform", "noise on keys and values only (method.md 3.3)", affects=("stage",)
    )
    noise_scale: Number = setting(
        0.2,
        "uniform: U(-scale/2, scale/2) * 512 / chat length; gaussian: standard deviation",
        affects=("stage",),
        ge=0,
    )
    noise_shortest: int = setting(
        128,
        "uniform noise of a chat with fewer tokens is that of a chat with so many; 1: no limit",
        affects=("stage",),
        ge=1,
    )
    dtype: Literal["float32", "bfloat16"] | None = setting(
        None,
        "dtype of the draft's products and activations; weights, optimizer, norms, softmax and "
        "loss are float32 always. null: bfloat16 on accelerators, float32 on CPUs",
        affects=("stage",),
    )
    loss: Literal["cross_entropy", "kl", "reverse_kl", "total_variation", "lk_hybrid"] = setting(
        "cross_entropy",
        "distance between the draft's and the target's distribution (training/distances.py)",
        affects=("stage",),
    )
    vloss_weight: Number = setting(
        10.0, "weight of the smooth-L1 term (method.md 3.2)", affects=("stage",), ge=0
    )
    optimizer: Literal["adamw", "muon"] = setting(
        "adamw",
        "adamw is the paper's; muon learns more per token, but does more work per step",
        affects=("stage",),
    )
    clip_norm: Number = setting(0.5, "limit of the global gradient norm", affects=("stage",), gt=0)
    beta1: Number = setting(0.9, "beta_1 of AdamW", affects=("stage",), ge=0, lt=1)
    beta2: Number = setting(0.95, "beta_2 of AdamW", affects=("stage",), ge=0, lt=1)
    weight_decay: Number = setting(
        0.0, "weight decay of matrices; norms have none", affects=("stage",), ge=0
    )
    ema: Number | None = setting(
        None,
        "decay of a moving average of the weights, for example 0.999, which is measured and "
        "exported in their place; null: none",
        affects=("stage",),
        gt=0,
        lt=1,
    )
    loss_rows: int = setting(
        128, "positions whose logits are in memory at the same time; fewer need less memory", ge=1
    )
    early: EarlyStage = setting(EarlyStage(), "the short form's first stage", affects=("stage",))
    late: AnyLateStage = setting(
        LateStage(),
        "the short form's second stage. Instead of a section: none, or simulate for a stage with "
        "settings from other places or defaults. dense: true makes it a test_time stage",
        affects=("stage",),
    )
    stages: Listed[AnyStage] | None = setting(
        None, "the long form: a list of stages in order; null: early, then late", affects=("stage",)
    )
    remat: Literal["none", "block"] = setting(
        "none",
        "block: the widest activations of the draft's block are not stored for the backward pass, "
        "but computed again, for some positions at a time; for long rows",
    )
    checkpoint_every: int = setting(
        200, "steps between checkpoints; each stage also ends with one", ge=1
    )
    accept_changes: bool = setting(
        False,
        "continue from checkpoints made with other settings; false: refuse, and name the settings",
    )

    @property
    def named_stages(self) -> dict[str, StageConfig]:
        """All stages in order, also those without steps, by the name of their checkpoints.

        The short form has "early" and "late". A stage of the long form is named after its
        objective; the second stage with the same objective is "late-2", and so on.
        """
        if self.stages is None:
            return {"early": self.early, "late": self.late}
        named: dict[str, StageConfig] = {}
        count: Counter[str] = Counter()
        for stage in self.stages:
            count[stage.objective] += 1
            number = count[stage.objective]
            named[f"{stage.objective}-{number}" if number > 1 else stage.objective] = stage
        return named

    @property
    def stages_to_run(self) -> dict[str, StageConfig]:
        """The stages of `named_stages` that have steps."""
        return {name: stage for name, stage in self.named_stages.items() if stage.steps}

    def record(self) -> dict[str, Any]:
        """Returns all values as a dictionary, with each stage under its name.

        A draft stores it as the record of its training.
        """
        shared = self.model_dump(exclude={"early", "late", "stages"})
        return shared | {name: stage.model_dump() for name, stage in self.named_stages.items()}

    def place_of(self, name: str) -> str:
        """Returns the dotted key of a stage of `named_stages`, as a config writes it."""
        if self.stages is None:
            return f"train.{name}"
        return f"train.stages[{list(self.named_stages).index(name)}]"

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        if self.stages is not None:
            short = [name for name in ("early", "late") if name in self.model_fields_set]
            if short:
                raise refusal(
                    f"{{at}}stages and {{at}}{short[0]} are both set, but they are two ways to "
                    "write the stages; remove one"
                )
            if not self.stages:
                raise refusal("{at}stages is []; expected one stage or more")
        for name, stage in self.named_stages.items():
            if stage.steps % self.accumulate:
                raise refusal(
                    f"{self.place_of(name)}.steps is {stage.steps}, no multiple of "
                    f"{{at}}accumulate = {self.accumulate}: the last batches would change nothing"
                )
        return self
