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
        "chats: a .jsonl[.gz] or .json file, a folder of .jsonl[.gz] files, "
        "hf:org/name[@revision] or hf:FOLDER; token rows: a .rows file or a folder of them; self: "
        "the target writes prompts and answers; openai:URL#MODEL: a server answers data.prompts",
        affects=("text", "stage"),
        path="input",
    )
    split: str = setting(
        "train",
        "split of an hf: dataset, as the datasets library writes it",
        affects=("text", "stage"),
    )
    streaming: bool = setting(
        False,
        "read an hf: dataset as a stream, without a copy on disk",
        affects=("stage",),
    )
    prompts: str | None = setting(
        None,
        "chats that the server of an openai: source answers, named as in data.source; null: the "
        "package's own prompts",
        affects=("text", "stage"),
        path="input",
    )
    answers: Literal["keep", "regenerate"] = setting(
        "keep",
        "keep: the answers of the chats; regenerate: the target writes each answer of a chat anew, "
        "after those that it wrote",
        affects=("text", "stage"),
    )
    folder: str = setting(
        "runs/data",
        "folder for prompts, answers and states, which later runs use again",
        affects=("stage",),
        path="output",
    )
    # A larger budget adds to the existing text, which stays valid.
    answer_tokens: int = setting(
        60_000,
        "tokens of answers to train on; no more text is written after them",
        affects=("stage",),
        ge=1,
    )
    max_prompt_tokens: int = setting(
        128,
        "limit in tokens; longer prompts are left out, and their number is printed",
        affects=("text", "stage"),
        ge=1,
    )
    max_chat_tokens: int = setting(
        2048,
        "limit in tokens; longer chats with answers are cut; those without an answer before the "
        "cut are left out, and their number is printed",
        affects=("text", "stage"),
        ge=1,
    )
    max_answer_tokens: int = setting(
        96, "limit in tokens of an answer that the target writes", affects=("text", "stage"), ge=1
    )
    temperature: Temperature = setting(
        0.0, "temperature of the answers; 0: greedy", affects=("text", "stage"), ge=0
    )
    top_k: int = setting(64, "sampling: most likely tokens kept", affects=("text", "stage"), ge=1)
    # Greedy text does not depend on the batch size. Sampled text does, because a batch draws for
    # all its rows at once, but existing sampled text stays valid with another batch size.
    batch: int = setting(64, "answers written at the same time", ge=1)
    seed: int = setting(
        0, "seed of sampling and of the order of prompts", affects=("text", "stage")
    )
    max_bad_share: Number = setting(
        0.2,
        "largest share of unusable records in a source; they are left out, and the log counts "
        "and names them",
        ge=0,
        le=1,
    )
    unread: Literal["ignore", "refuse"] = setting(
        "ignore",
        "a chat's fields that neither a rule nor the chat template reads; ignore: each is named "
        "once, with its line",
    )
    states: Literal["disk", "online"] = setting(
        "disk",
        "the target's states; disk: computed once and stored; online: computed in every training "
        "step",
        affects=("stage",),
    )
    states_dtype: Literal["float32", "bfloat16", "int8"] | None = setting(
        None,
        "dtype of states on disk; int8 has one scale per token; null: target.dtype",
        affects=("text", "stage"),
    )

    states_tokens: int = setting(
        8192,
        "tokens of one forward pass that computes states, on each device; more need more memory",
        ge=1,
    )
    workers: int = setting(
        4, "threads that read the states of a batch; the order of rows does not depend on it", ge=1
    )

    @model_validator(mode="after")
    def _check_prompts(self) -> Self:
        if self.prompts is not None and not self.source.startswith("openai:"):
            raise refusal(
                f"{{at}}prompts is {self.prompts}, which only an openai: source reads; make it "
                "{at}source"
            )
        if self.prompts is not None and self.prompts.startswith(("self", "openai:")):
            raise refusal(f"{{at}}prompts is {self.prompts}; expected a file, a folder or hf:..")
        return self

    @model_validator(mode="after")
    def _check_states(self) -> Self:
        if self.states == "online" and self.states_dtype is not None:
            raise refusal(
                f"{{at}}states_dtype is {self.states_dtype}, but {{at}}states: online keeps none; "
                "remove one"
            )
        return self
