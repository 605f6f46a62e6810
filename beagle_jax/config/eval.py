"""Section `eval`: what is measured, during training and after it."""

from typing import Literal, Self

from pydantic import model_validator

from beagle_jax.config.section import Listed, Number, Section, refusal, setting


class EvalConfig(Section):
    """What `evaluate` measures on."""

    suites: Listed[str] = setting(
        ("held_out",),
        "sets of prompts; held_out: 40 prompts of this repository; other names in "
        "evaluation/suites.py; or .jsonl[.gz] files",
        affects=("answers", "tau"),
        path="input",
    )
    folder: str | None = setting(
        None,
        "folder with the files of the suites; what is not there is downloaded from the hub; null: "
        "no folder",
        path="input",
    )
    limit: int | None = setting(
        None, "number of first prompts to use of each suite; null: all", affects=("answers",), ge=1
    )
    max_new_tokens: int = setting(
        96, "limit in tokens of an answer", affects=("answers", "tau"), ge=1
    )
    batch: Listed[int] = setting(
        (),
        "batch sizes at which throughput is measured too, for example [1, 2, 4, 8]; empty: none",
    )
    compare: Listed[str] = setting(
        (), "more drafts to compare with the first, as in draft.path", path="input"
    )
    every: int = setting(
        0,
        "training: steps between two measurements of tau with the real decoder; 0: none",
        affects=("tau",),
        ge=0,
    )
    train_prompts: int = setting(
        8,
        "training: number of prompts for these measurements, from the first suite, in one batch",
        affects=("tau",),
        ge=1,
    )
    best_by: Literal["tau", "held_out_loss"] = setting(
        "tau",
        "training: what is measured every so many steps, and decides which draft is the best; "
        "held_out_loss decodes nothing and needs log.eval_rows",
        affects=("tau",),
    )
    most_time: Number | None = setting(
        None,
        "training: largest share of the run's time for measurements of tau; those that would "
        "exceed it are left out, except at a stage's end; null: no limit",
        gt=0,
        le=1,
    )
    patience: int = setting(
        0,
        "training: measurements without a better one after which a stage ends; 0: never",
        ge=0,
    )

    @property
    def decodes(self) -> bool:
        """Whether training measures tau, for which the whole target stays in memory."""
        return self.every > 0 and self.best_by == "tau"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.suites or len(set(self.suites)) < len(self.suites):
            listed = str(list(self.suites)).replace("{", "{{").replace("}", "}}")
            raise refusal(f"{{at}}suites is {listed}; expected one name or more, each once")
        if any(size < 1 for size in self.batch) or len(set(self.batch)) < len(self.batch):
            raise refusal(
                f"{{at}}batch is {list(self.batch)}; expected numbers of rows of at least 1, each "
                "once"
            )
        if self.patience and not self.every:
            raise refusal(
                f"{{at}}patience is {self.patience}, but {{at}}every is 0: nothing would be "
                "measured; set {at}every"
            )
        return self
