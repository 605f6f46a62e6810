"""The report of an evaluation: its fields, their meaning, reading it, and its table.

`python -m beagle_jax.evaluation.report` writes report.schema.json, beside this file, from these
models. evaluation/figures.py computes the values.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_serializer
from pydantic.json_schema import GenerateJsonSchema, SkipJsonSchema

from beagle_jax.errors import BadFile
from beagle_jax.files import write_text
from beagle_jax.json_file import read_json

FORMAT: Literal[1] = 1  # increases when a field changes its meaning or is removed
SCHEMA = Path(__file__).with_name("report.schema.json")

_SETTINGS = ("target", "draft", "decode", "eval")  # sections that every report has
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Interval = tuple[float, float]
By = Literal["all", "category", "context"]
_Optional = float | SkipJsonSchema[None]  # a number, or no such field in the file


class Part(BaseModel):
    """A part of the report. It cannot be changed."""

    # Reports of later versions may have further fields in the same format.
    model_config = ConfigDict(
        frozen=True,
        extra="ignore",
        serialize_by_alias=True,
        json_schema_extra={"additionalProperties": False},
    )


class Environment(Part):
    """The machine and the versions that the figures come from."""

    machine: str = Field(description="platform, device or processor, jax version")
    devices: Count = Field(description="devices of the process")
    cores: int | None = Field(description="processor cores")
    python: str = Field(description="version")
    jax: str = Field(description="version")
    jaxlib: str = Field(description="version")
    beagle_jax: str = Field(description="version")


class Milliseconds(Part):
    """Mean times. draft, verify and rest do not exist if the measurement was interrupted."""

    prefill: float = Field(description="reading a prompt, and its first token")
    round: float = Field(description="a whole round, from whole answers")
    draft: _Optional = Field(default=None, description="drafting a tree, alone in a loop")
    verify: _Optional = Field(
        default=None,
        description="the target's pass over the tree and its choice of tokens, alone in a loop",
    )
    rest: _Optional = Field(
        default=None,
        description="round minus draft minus verify: cache writes and host work; below zero if the "
        "parts alone took longer",
    )

    @model_serializer
    def measured(self) -> dict[str, float]:
        """Returns the times that were measured, by phase."""
        return {name: value for name, value in self if value is not None}


class Memory(Part):
    """Bytes in memory."""

    target_weights: Count | None = Field(description="all tensors of the target")
    draft_weights: Count | None = Field(
        description="the draft's tensors, and its copy of head rows if it scores fewer tokens than "
        "the target"
    )
    target_cache: Count | None = Field(description="keys and values, at the capacity in use")
    draft_cache: Count | None = Field(description="the draft's keys and values")
    decode_temporaries: Count | None = Field(
        description="what the compiled decoding loop states beyond its arguments and results; null "
        "if it states nothing"
    )
    prefill_temporaries: Count | None = Field(description="the same of reading a prompt")
    device_peak: Count | None = Field(
        description="the device's own counter for the whole process; null if it has none"
    )


class SystemEntry(Part):
    """One way of decoding."""

    name: str = Field(description="plain, lookup, or the folder of a draft")
    tree: str = Field(description="what is drafted per round, in words")
    levels: Count = Field(description="draft steps per round")
    nodes: Count = Field(description="tokens verified per round, the root included")
    trained_tokens: int | None = Field(
        description="longest text that the draft was trained on, tokens; null if that is unknown "
        "or there is no training"
    )
    compiles_after_warm_up: Count = Field(
        description="programs compiled while times were taken; 0 unless something is wrong"
    )
    milliseconds: Milliseconds = Field(description="mean times")
    bytes: Memory | None = Field(description="memory; null without --out")
    best_speedup: float | None = Field(
        default=None,
        ge=0,
        description="speedup that acceptance and costs of a round allow: tau times the time of "
        "plain decoding's pass, over draft and verify; no prefill, cache writes and host work; "
        "null for plain decoding, and where phases were not measured",
    )


class Figures(Part):
    """One system on one group of prompts (method.md 7.1)."""

    answers: Count = Field(description="answers: one for each turn of each prompt")
    tokens: Count = Field(description="generated tokens, stop tokens included")
    rounds: Count = Field(
        description="draft, verify, accept iterations; the prefill is not a round"
    )
    tau: float = Field(
        ge=1,
        description="tokens per round, the target's own token included, the prefill's excluded",
    )
    tau_interval: Interval = Field(
        description="95 % bootstrap interval of tau, over prompts; of a single prompt both ends "
        "are tau itself"
    )
    accepted: list[Count] = Field(
        description="rounds that accepted 0, 1, .. drafts; only emitted drafts count"
    )
    step_alpha: list[Share] = Field(
        description="per draft depth, of the rounds that reached it, the share that accepted it"
    )
    tokens_per_second: float = Field(
        ge=0, description="all tokens over all time, prefill included, compilation excluded"
    )
    decode_tokens_per_second: float = Field(
        ge=0, description="tokens after each answer's first over the time after the prefill"
    )
    speedup: float = Field(
        ge=0, description="tokens per second over those of the first system, plain decoding"
    )
    speedup_interval: Interval = Field(
        description="95 % bootstrap interval of the speedup, over prompts, both systems drawn "
        "together; of a single prompt both ends are the speedup itself"
    )
    prefill_seconds: float = Field(ge=0, description="sum over answers")
    decode_seconds: float = Field(ge=0, description="sum over answers, prefill excluded")
    identical_to_plain: Count = Field(
        description="answers with exactly the tokens of plain decoding"
    )
    repeated_4_grams: Share = Field(
        description="share of 4-grams that already occurred in the same answer; repetitive text "
        "inflates acceptance"
    )


class Group(Part):
    """Some prompts of a suite."""

    by: By = Field(description="what the prompts share")
    of: str = Field(
        description="the category; or the most tokens that prompts of this range have, a power of "
        "two; empty for all"
    )
    prompts: Count = Field(description="prompts with all their turns; for context, single turns")
    systems: dict[str, Figures] = Field(min_length=1, description="figures by the system's name")


class Suite(Part):
    """One suite."""

    name: str = Field(description="as in eval.suites")
    turns_left_out: Count = Field(
        description="turns that did not fit the target's context, the same for all systems"
    )
    groups: list[Group] = Field(
        min_length=1,
        description="all prompts first, then each category and each range of prompt lengths if "
        "there are several",
    )

    @property
    def whole(self) -> Group:
        """All prompts of the suite."""
        return self.groups[0]


class BatchFigures(Part):
    """One system at one batch size."""

    tokens_per_second: float = Field(ge=0, description="tokens of all answers over the whole time")
    speedup: float = Field(ge=0, description="over plain decoding at the same batch size")


class Throughput(Part):
    """All systems at one batch size."""

    batch: int = Field(ge=1, description="rows that run at once; a finished one is refilled")
    answers: Count = Field(description="answers of each system")
    systems: dict[str, BatchFigures] = Field(min_length=1, description="by the system's name")


class Check(Part):
    """A claim of the audit, and its result."""

    name: str = Field(description="what was checked, of which system")
    passed: bool = Field(description="the claim holds")
    figures: str = Field(alias="found", description="the figures, in words")


class Divergence(Part):
    """An answer that differs from plain decoding's, and where it first does."""

    system: str = Field(description="its name")
    suite: str = Field(description="its name")
    number: Count = Field(description="of the prompt, from 0")
    turn: Count = Field(description="of the prompt, from 0")
    place: Count = Field(description="of the token in the answer, from 0")
    plain: int | None = Field(description="plain decoding's token; null if its answer had ended")
    system_token: int | None = Field(description="the other token; null if its answer had ended")
    gap: float = Field(
        ge=0,
        description="how far the less likely of the two lies below the largest logit under teacher "
        "forcing; the largest float32 if an answer had ended",
    )
    top_2_gap: float = Field(ge=0, description="difference of the two highest logits there")
    within_noise: bool | None = Field(
        description="the gap is at most the reach; null for draws, which logits alone do not decide"
    )

    @property
    def change(self) -> str:
        """The difference as "11 became 12": plain decoding's token, then the other.

        "the end" stands for a token if that answer had already ended.
        """
        return " became ".join(
            "the end" if token is None else str(token) for token in (self.plain, self.system_token)
        )


class Audit(Part):
    """Result of --audit."""

    passed: bool = Field(description="every check passed")
    noise: float = Field(
        ge=0,
        description="largest difference between the logits of a text in one pass and of its last "
        "tokens read one by one, over the longest texts",
    )
    reach: float = Field(
        ge=0,
        description="gap of two logits up to which such differences explain that another token was "
        "chosen; right decoding goes beyond it in one of ten thousand audits at most "
        "(evaluation/chance.py)",
    )
    checks: list[Check] = Field(min_length=1, description="one for each claim")
    divergences: list[Divergence] = Field(
        description="each answer that differs from plain decoding's, where it first does"
    )


class Report(Part):
    """Figures of several ways of decoding on the same prompts, in one process.

    The README defines tau, step-alpha and speedup.
    """

    format: Literal[1] = Field(
        description="increases when a field changes its meaning or is removed; new fields leave it "
        "as it is"
    )
    environment: Environment = Field(description="where the figures come from")
    settings: dict[str, Any] = Field(
        description="the whole config, with its names",
        json_schema_extra={"required": list(_SETTINGS)},
    )
    notes: list[str] = Field(description="what a reader should know before trusting a figure")
    systems: list[SystemEntry] = Field(min_length=1, description="plain decoding first")
    suites: list[Suite] = Field(min_length=1, description="in the order of eval.suites")
    audit: Audit | None = Field(description="result of --audit; null without it")
    throughput: list[Throughput] = Field(
        default=[], description="by batch size, in the order of eval.batch"
    )
    interrupted: bool = Field(
        default=False, description="the measurement was ended by hand before its end"
    )

    @property
    def speculative(self) -> list[SystemEntry]:
        """The systems with a draft, in the order of the settings."""
        return self.systems[1:]

    def pays_below(self, name: str) -> int | None:
        """Smallest measured batch size at which a system is no faster than plain decoding.

        None if it is faster at all of them.
        """
        batches = sorted(self.throughput, key=lambda entry: entry.batch)
        return next((at.batch for at in batches if at.systems[name].speedup <= 1), None)

    def as_json(self) -> dict[str, Any]:
        """Returns the report as plain values, as it is written to files."""
        return self.model_dump(mode="json")

    @classmethod
    def read(cls, path: Path) -> "Report":
        """Reads a report file of this version or an earlier one.

        Raises: UserError if the file is not such a report.
        """
        expected = "expected a file from evaluate --json"
        values = read_json(path, expected)
        if values.get("format", FORMAT) != FORMAT:
            raise BadFile(
                path, f"not a report of this version (format {values['format']!r}); {expected}"
            )
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problem = error.errors()[0]
            place = ".".join(map(str, problem["loc"]))
            raise BadFile(path, f"not a report ({place}: {problem['msg']}); {expected}") from error


class _Plain(GenerateJsonSchema):
    """Leaves out titles, which would repeat names, and defaults, which no file contains."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def default_schema(self, schema: Any) -> dict[str, Any]:
        return self.generate_inner(schema["schema"])


def schema() -> dict[str, Any]:
    """Returns the JSON Schema of a report."""
    made = Report.model_json_schema(schema_generator=_Plain)
    return {
        "$schema": GenerateJsonSchema.schema_dialect,
        **made,
        "title": "Report of beagle_jax.evaluate",
    }


def table(report: Report) -> str:
    """Formats the report for the terminal: a block per suite, a line per system."""
    blocks = []
    for suite in report.suites:
        title = [suite.name] if len(report.suites) > 1 else []
        notes = []
        if suite.turns_left_out:
            notes = [f"{suite.turns_left_out} turns did not fit the context and were left out"]
        blocks.append("\n".join([*title, *_lines(report.systems, suite.whole.systems), *notes]))
    return "\n".join(
        [
            "\n\n".join(blocks),
            *_best(report),
            *batch_lines(report),
            "tok/s: prefill included; decode: without it. Times exclude compilation.",
            *report.notes,
        ]
    )


def _best(report: Report) -> list[str]:
    """The best speedup of each draft beside the measured one."""
    lines = []
    for system in report.speculative:
        if system.best_speedup is None:
            continue
        speedups = (suite.whole.systems[system.name].speedup for suite in report.suites)
        measured = ", ".join(f"{speedup:.2f}x" for speedup in speedups)
        lines.append(
            f"{system.name}: at best {system.best_speedup:.2f}x with this acceptance and this "
            f"machine's costs of a round; measured {measured}"
        )
    return lines


def batch_lines(report: Report) -> list[str]:
    """Formats throughput by batch size, and from where on a draft does not pay."""
    if not report.throughput:
        return []
    names = [system.name for system in report.systems]
    widths = [max(len(name), 17) for name in names]
    head = zip(names, widths, strict=True)
    lines = ["", "tok/s   " + "  ".join(f"{name:>{width}}" for name, width in head)]
    for entry in report.throughput:
        cells = []
        for name, width in zip(names, widths, strict=True):
            values = entry.systems[name]
            speedup = "" if name == names[0] else f" ({values.speedup:.2f}x)"
            cells.append(f"{values.tokens_per_second:.1f}{speedup}".rjust(width))
        lines.append(f"batch {entry.batch:<2d}" + "  ".join(cells))
    return [*lines, *paying(report)]


def paying(report: Report) -> list[str]:
    """Says of each draft from which batch size on it does not pay."""
    said = []
    for system in report.speculative if report.throughput else []:
        size = report.pays_below(system.name)
        if size is None:
            said.append(f"{system.name} is faster than plain decoding at all these batch sizes.")
        else:
            said.append(f"{system.name} is no faster than plain decoding at batch {size}.")
    return said


def _lines(systems: list[SystemEntry], whole: dict[str, Figures]) -> list[str]:
    width = max(map(len, whole))
    head = (
        f"{'':{width}}  {'tau':>5}  {'tok/s':>7}  {'decode':>7}  {'speedup':>7}  {'rounds':>6} "
        f" {'tokens':>6}  {'compiles':>8}  identical to plain decoding"
    )
    lines = [head, "-" * len(head)]
    for system in systems:
        values = whole[system.name]
        lines.append(
            f"{system.name:{width}}  {values.tau:5.2f}  {values.tokens_per_second:7.1f}  "
            f"{values.decode_tokens_per_second:7.1f}  {values.speedup:6.2f}x  "
            f"{values.rounds:6d}  {values.tokens:6d}  {system.compiles_after_warm_up:8d}  "
            f"{values.identical_to_plain}/{values.answers}"
        )
    lines += [
        f"{system.name}: {system.tree}; step-alpha by depth "
        f"{'  '.join(f'{share:.2f}' for share in alpha)}"
        for system in systems
        if (alpha := whole[system.name].step_alpha)
    ]
    repeated = whole[systems[0].name].repeated_4_grams
    return [*lines, f"repeated 4-grams in the answers: {repeated:.1%}"]


if __name__ == "__main__":
    write_text(SCHEMA, json.dumps(schema(), indent=1) + "\n")
