"""Section `eval`: what is measured, during training and after it."""

from typing import Self

from pydantic import model_validator

from beagle_jax.config.section import Listed, Section, refusal, setting


class EvalConfig(Section):
    """What `evaluate` measures on."""

    suites: Listed[str] = setting(
        ("held_out",),
        "held_out: 40 committed prompts; names of evaluation/suites.py; .jsonl[.gz] files",
        affects=("answers", "tau"),
        path="input",
    )
    folder: str | None = setting(
        None,
        "where the suites' files are looked for before they are downloaded from the hub; null: "
        "nowhere",
        path="input",
    )
    limit: int | None = setting(
        None, "only the first so many prompts of each suite", affects=("answers",), ge=1
    )
    max_new_tokens: int = setting(96, "tokens per answer", affects=("answers", "tau"), ge=1)
    compare: Listed[str] = setting(
        (), "more drafts to show beside the first: folders, or lookup", path="input"
    )
    every: int = setting(
        0,
        "training: steps between two measurements of tau with the real decoder; 0: none",
        affects=("tau",),
        ge=0,
    )
    train_prompts: int = setting(
        8,
        "training: prompts of the first suite that it is measured on, in one batch",
        affects=("tau",),
        ge=1,
    )
    patience: int = setting(
        0,
        "training: a stage ends after so many measurements without a better tau; 0: never",
        ge=0,
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.suites or len(set(self.suites)) < len(self.suites):
            listed = str(list(self.suites)).replace("{", "{{").replace("}", "}}")
            raise refusal(f"{{at}}suites is {listed}; expected one name or more, each once")
        if self.patience and not self.every:
            raise refusal(
                f"{{at}}patience is {self.patience}, but {{at}}every is 0: nothing would be "
                "measured; set {at}every"
            )
        return self
