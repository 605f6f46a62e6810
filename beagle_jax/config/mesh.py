"""Section `mesh`: how training and decoding are spread over devices."""

from typing import Annotated, Self

from pydantic import AfterValidator, WithJsonSchema, model_validator

from beagle_jax.config.section import Section, refusal, setting


def _size(value: int) -> int:
    if value != -1 and value < 1:
        raise refusal(
            f"{{key}} is {value}; expected at least 1, or -1 for the devices that the others leave"
        )
    return value


_Size = Annotated[
    int,
    AfterValidator(_size),
    WithJsonSchema({"type": "integer", "anyOf": [{"const": -1}, {"minimum": 1}]}),
]


class MeshConfig(Section):
    """How training and decoding are spread over devices (sharding.py).

    In training the sizes multiply to the number of devices. A decoder takes the first devices.
    """

    data: _Size = setting(
        -1,
        "parts of a batch (data parallel); -1: all devices that the others leave, in decoding 1",
        affects=("answers",),
    )
    fsdp: _Size = setting(
        1,
        "training: parts of a batch, of each trained matrix and of its optimizer state; decoding: "
        "parts of each matrix; -1: the rest",
        affects=("answers",),
    )
    sequence: _Size = setting(
        1,
        "training: parts of each row's positions, for rows that one device cannot hold; -1: the "
        "rest; decoding: 1",
    )
    expert: _Size = setting(
        1,
        "decoding and prepare: parts of the set of experts, for a target with experts; each device "
        "of these has whole experts, and its part of all that mesh.tensor splits; -1: the rest; "
        "training: 1",
        affects=("answers",),
    )
    tensor: _Size = setting(
        1,
        "parts of heads, MLP width and vocabulary; -1: the rest",
        affects=("answers",),
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        rest = [name for name, size in self.model_dump().items() if size == -1]
        if len(rest) > 1:
            raise refusal(
                f"{' and '.join('{at}' + name for name in rest)} are both -1 (all devices that the "
                "others leave); expected at most one -1"
            )
        return self
