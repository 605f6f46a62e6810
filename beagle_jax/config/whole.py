"""The whole config: its sections, and the rules between settings of different sections."""

from typing import Any, Self

from pydantic import model_validator

from beagle_jax.config.data import DataConfig
from beagle_jax.config.decode import DecodeConfig
from beagle_jax.config.draft import DraftConfig
from beagle_jax.config.eval import EvalConfig
from beagle_jax.config.kinds import with_defaults
from beagle_jax.config.log import LogConfig
from beagle_jax.config.mesh import MeshConfig
from beagle_jax.config.section import Section, refusal, setting
from beagle_jax.config.serve import ServeConfig
from beagle_jax.config.stage import EarlyStage, LateStage
from beagle_jax.config.target import TargetConfig
from beagle_jax.config.train import TrainConfig


class Config(Section):
    """One file, the same sections for every command."""

    target: TargetConfig = setting(..., "the frozen LLM")
    draft: DraftConfig = setting(DraftConfig(), "the drafter")
    data: DataConfig = setting(DataConfig(), "chats to train on")
    train: TrainConfig = setting(TrainConfig(), "training stages, and the settings they share")
    mesh: MeshConfig = setting(MeshConfig(), "devices of a run")
    decode: DecodeConfig = setting(DecodeConfig(), "draft tree, sampling, end of an answer")
    eval: EvalConfig = setting(EvalConfig(), "prompts and limits of evaluation")
    log: LogConfig = setting(LogConfig(), "metrics of a training run")
    serve: ServeConfig = setting(ServeConfig(), "the server")

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        return with_defaults(values)

    @model_validator(mode="after")
    def _check_eagle(self) -> Self:
        """Refuses settings that have no meaning for EAGLE drafts (training/eagle.py)."""
        kind = self.draft.kind
        name = {"eagle": "EAGLE", "eagle3": "EAGLE-3"}.get(kind)
        if name is None:
            return self
        if self.draft.init == "ridge":
            raise refusal(
                f"draft.kind is {kind} and draft.init is ridge, the closed-form start of a Beagle "
                f"draft; expected normal or the folder of a trained {name} draft"
            )
        if self.mesh.sequence != 1:
            raise refusal(
                f"draft.kind is {kind} and mesh.sequence is {self.mesh.sequence}, but the queries "
                f"of an {name} draft are not split along a row; set mesh.sequence to 1, and "
                "mesh.fsdp to the number of devices"
            )
        if kind == "eagle3" and self.train.vloss_weight:
            raise refusal(
                f"draft.kind is eagle3 and train.vloss_weight is {self.train.vloss_weight}, but "
                "its loss has no term on states (method.md 14); leave train.vloss_weight out"
            )
        for stage_name, stage in self.train.stages_to_run.items():
            place = self.train.place_of(stage_name)
            if isinstance(stage, EarlyStage) and stage.window != 1:
                raise refusal(
                    f"draft.kind is {kind} and {place}.window is {stage.window}, but {name} "
                    f"predicts the next position only; set {place}.window to 1"
                )
            if isinstance(stage, LateStage):
                wrong, remedy = f"{place}.objective is late", f"set {place}.objective to test_time"
                if self.train.stages is None:
                    wrong = "train.late.dense is false"
                    remedy = "set train.late.dense to true, or train.late to none"
                raise refusal(
                    f"draft.kind is {kind} and {wrong}, but its late stage, training-time test, "
                    f"drafts from every position; {remedy}"
                )
        return self

    @model_validator(mode="after")
    def _check_lookup(self) -> Self:
        if self.draft.path == "lookup" and self.decode.lookup_nodes:
            raise refusal(
                f"draft.path is lookup and decode.lookup_nodes is {self.decode.lookup_nodes}, but "
                "prompt lookup drafts a chain of looked-up tokens already, and these nodes stand "
                "beside the tree of a trained draft; set decode.lookup_nodes to 0, or draft.path "
                "to a trained draft"
            )
        return self

    @model_validator(mode="after")
    def _check_measurements(self) -> Self:
        if 0 < self.log.eval_rows < self.train.batch:
            raise refusal(
                f"log.eval_rows is {self.log.eval_rows}, less than train.batch = "
                f"{self.train.batch}, but held-out chats are measured in whole batches; raise "
                "log.eval_rows, or set it to 0"
            )
        if self.eval.every and self.eval.best_by == "held_out_loss" and not self.log.eval_rows:
            raise refusal(
                "eval.best_by is held_out_loss, but log.eval_rows is 0: no chats are held out; set "
                "log.eval_rows"
            )
        return self
