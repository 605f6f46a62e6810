"""Section `data`: chats to train on, and how the target answers prompts."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, model_validator

from beagle_jax.config.section import Number, Section, refusal, setting

# Smallest temperature above 0. Logits divided by a much smaller one overflow, and then all tokens
# have the same probability.
COLDEST = 1e-6


def _warm(value: float) -> float:
    if 0 < value < COLDEST:
        raise refusal(f"{{key}} is {value}; expected 0 (greedy), or at least {COLDEST}")
    return value


Temperature = Annotated[Number, AfterValidator(_warm)]


class DataConfig(Section):
    """Chats to train on, and how the target answers prompts that have no answer."""

    source: str = setting(
        "self",
        "self: the target writes all; a .jsonl[.gz] or .json file; a folder; "
        "hf:org/name[@revision]; hf:FOLDER",
        affects=("text", "stage"),
        path="input",
    )
    split: str = setting(
        "train",
        "of an hf: dataset, as the datasets library writes it",
        affects=("text", "stage"),
    )
    streaming: bool = setting(
        False,
        "read an hf: dataset as it comes, and keep nothing of it on disk",
        affects=("stage",),
    )
    answers: Literal["keep", "regenerate"] = setting(
        "keep",
        "regenerate: chats are cut at their first answer, and the target writes it",
        affects=("text", "stage"),
    )
    folder: str = setting(
        "runs/data",
        "where prompts, answers and states are kept, for this and the next run",
        affects=("stage",),
        path="output",
    )
    # A larger budget adds to the existing text, which stays valid.
    answer_tokens: int = setting(
        60_000,
        "tokens of answers; no more text is written once there are so many",
        affects=("stage",),
        ge=1,
    )
    max_prompt_tokens: int = setting(
        128,
        "tokens; longer prompts are left out, and counted",
        affects=("text", "stage"),
        ge=1,
    )
    max_chat_tokens: int = setting(
        2048,
        "tokens; chats that have answers are cut here; those without one before the cut are left "
        "out, and counted",
        affects=("text", "stage"),
        ge=1,
    )
    max_answer_tokens: int = setting(
        96, "tokens; an answer is cut here", affects=("text", "stage"), ge=1
    )
    temperature: Temperature = setting(
        0.0, "of the answers; 0 is greedy", affects=("text", "stage"), ge=0
    )
    top_k: int = setting(
        64, "when sampling, most likely tokens kept", affects=("text", "stage"), ge=1
    )
    # Greedy text does not depend on the batch size. Sampled text does, because a batch draws for
    # all its rows at once, but existing sampled text stays valid with another batch size.
    batch: int = setting(64, "answers written at once", ge=1)
    seed: int = setting(0, "of sampling and of the order of prompts", affects=("text", "stage"))
    max_bad_share: Number = setting(
        0.2,
        "share of a source's records that may be unusable; they are left out, counted and named",
        ge=0,
        le=1,
    )
    states: Literal["disk", "online"] = setting(
        "disk",
        "the target's states: computed once and read back, or anew in every training step",
        affects=("stage",),
    )
    states_dtype: Literal["float32", "bfloat16", "int8"] | None = setting(
        None,
        "of states on disk; int8 has a scale a token; null: target.dtype",
        affects=("text", "stage"),
    )

    @model_validator(mode="after")
    def _check_states(self) -> Self:
        if self.states == "online" and self.states_dtype is not None:
            raise refusal(
                f"{{at}}states_dtype is {self.states_dtype}, but {{at}}states: online keeps none; "
                "remove one"
            )
        return self
