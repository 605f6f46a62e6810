"""Stages of training. Each kind has an objective, and only the settings that it uses."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from beagle_jax.config.section import Listed, Number, Section, refusal, setting

_AFFECTS: Any = ("stage",)


class _Stage(Section):
    """What every stage has."""

    steps: int = setting(0, "batches; 0 skips the stage", affects=_AFFECTS, ge=0)
    learning_rate: Number = setting(3e-5, "peak, reached after warm-up", affects=_AFFECTS, ge=0)
    warmup: int = setting(100, "batches of linear warm-up", affects=_AFFECTS, ge=0)
    schedule: Literal["constant", "cosine", "wsd"] = setting(
        "constant",
        "learning rate after warm-up: constant, a cosine to zero, or constant up to a linear end",
        affects=_AFFECTS,
    )
    decay: int | None = setting(
        None,
        "wsd: batches of the linear end; null: a fifth of the steps",
        affects=_AFFECTS,
        ge=1,
    )

    @property
    def ending(self) -> int:
        """Batches of the linear end of `wsd`, at least 1."""
        return max(1, self.steps // 5) if self.decay is None else self.decay

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        if self.decay is not None and self.schedule != "wsd":
            raise refusal(
                f"{{at}}decay is {self.decay}, but {{at}}schedule is {self.schedule}; it is the "
                "end of wsd alone"
            )
        if self.schedule == "wsd" and self.steps and self.ending > self.steps - self.warmup:
            raise refusal(
                f"{{at}}decay is {self.ending} batches, but only {self.steps - self.warmup} of "
                f"{{at}}steps = {self.steps} come after {{at}}warmup = {self.warmup}"
            )
        return self


class EarlyStage(_Stage):
    """Every position of a window is predicted from true states (method.md 3)."""

    objective: Literal["early"] = setting("early", "training objective", affects=_AFFECTS)
    steps: int = setting(1000, "batches; 0 skips the stage", affects=_AFFECTS, ge=0)
    window: int = setting(
        5,
        "k: positions predicted from one context (method.md 3.1); 1 for EAGLE",
        affects=_AFFECTS,
        ge=1,
    )

    # Settings of the other kinds of stage, with the fixed values of an early stage.
    simulation_steps: ClassVar[int] = 1
    weights: ClassVar[tuple[float, ...]] = (1.0,)
    detach: ClassVar[bool] = True
    dense: ClassVar[bool] = False
    multi_token: ClassVar[bool] = False


class LateStage(_Stage):
    """Draft steps are simulated from the start of each window (method.md 4)."""

    objective: Literal["late"] = setting("late", "training objective", affects=_AFFECTS)
    steps: int = setting(500, "batches; 0 skips the stage", affects=_AFFECTS, ge=0)
    window: int = setting(
        4, "k: positions predicted from one context (method.md 3.1)", affects=_AFFECTS, ge=1
    )
    simulation_steps: int = setting(
        4, "s: draft steps simulated; at most the window", affects=_AFFECTS, ge=1
    )
    step_weights: Listed[Number] | None = setting(
        None, "beta_1..beta_s of the loss; null: s, s-1, .., 1", affects=_AFFECTS
    )
    detach: bool = setting(
        True, "no gradient through predicted states (method.md 4.6)", affects=_AFFECTS
    )
    multi_token: bool = setting(
        False,
        "a simulated step also predicts the rest of its window: l = k instead of l = i "
        "(method.md 4.2)",
        affects=_AFFECTS,
    )

    dense: ClassVar[bool] = False

    @property
    def weights(self) -> tuple[float, ...]:
        """beta_1..beta_s: the weight of each draft step in the loss (method.md 4.2)."""
        return self.step_weights or _falling(self.simulation_steps)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.simulation_steps > self.window:
            raise refusal(
                f"{{at}}simulation_steps is {self.simulation_steps}, more than the window "
                f"{self.window}; a window of k positions has at most k draft steps"
            )
        _check_weights(self)
        return self


class TestTimeStage(_Stage):
    """Draft steps are simulated from every position, at s times the cost of an early stage.

    EAGLE-3 calls it training-time test. It has no windows. For an EAGLE-3 draft some defaults are
    others (config/kinds.py).
    """

    __test__: ClassVar[bool] = False  # pytest collects classes of such names

    objective: Literal["test_time"] = setting("test_time", "training objective", affects=_AFFECTS)
    steps: int = setting(500, "batches; 0 skips the stage", affects=_AFFECTS, ge=0)
    simulation_steps: int = setting(
        4, "s: draft steps simulated; unset it is 7 for EAGLE-3", affects=_AFFECTS, ge=1
    )
    step_weights: Listed[Number] | None = setting(
        None, "beta_1..beta_s of the loss; null: those of step_decay", affects=_AFFECTS
    )
    step_decay: Number | None = setting(
        None,
        "beta_t = step_decay ** (t - 1); unset it is 0.8 for EAGLE-3; null: s, s-1, .., 1",
        affects=_AFFECTS,
        gt=0,
    )
    detach: bool = setting(
        True,
        "no gradient through predicted states (method.md 4.6); unset it is false for EAGLE-3",
        affects=_AFFECTS,
    )

    window: ClassVar[int] = 1
    dense: ClassVar[bool] = True
    multi_token: ClassVar[bool] = False

    @property
    def weights(self) -> tuple[float, ...]:
        """beta_1..beta_s: the weight of each draft step in the loss (method.md 4.2, 14)."""
        if self.step_weights is not None:
            return self.step_weights
        if self.step_decay is None:
            return _falling(self.simulation_steps)
        return tuple(self.step_decay**step for step in range(self.simulation_steps))

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_weights(self)
        if self.step_weights is not None and self.step_decay is not None:
            raise refusal(
                "{at}step_weights and {at}step_decay are both set, and both say what a step "
                "weighs; leave one out"
            )
        return self


def _falling(steps: int) -> tuple[float, ...]:
    return tuple(float(weight) for weight in range(steps, 0, -1))


def _check_weights(stage: LateStage | TestTimeStage) -> None:
    if stage.step_weights is not None and len(stage.step_weights) != stage.simulation_steps:
        raise refusal(
            f"{{at}}step_weights has {len(stage.step_weights)} entries; expected "
            f"{stage.simulation_steps}, one for each of {{at}}simulation_steps"
        )


StageConfig = EarlyStage | LateStage | TestTimeStage
AnyStage = Annotated[StageConfig, Field(discriminator="objective")]
AnyLateStage = Annotated[LateStage | TestTimeStage, Field(discriminator="objective")]
STAGES: dict[str, type[_Stage]] = {
    "early": EarlyStage,
    "late": LateStage,
    "test_time": TestTimeStage,
}
