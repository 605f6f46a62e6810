"""What all sections of a config have in common: frozen, strict, and checked by pydantic."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

# What is kept on disk and used again only where the settings that decide it are the same:
# the training text and its states, a stage's checkpoints, an evaluation's answers, and the
# taus that training compares.
Result = Literal["text", "stage", "answers", "tau"]
# input: a file or folder that is read; output: one that is written.
PathKind = Literal["input", "output"]


class Section(BaseModel):
    """A section of a config. It cannot be changed; `changed` gives another one.

    Building one checks it: pydantic.ValidationError says what is wrong.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def changed(self, **values: Any) -> Self:
        """This section with other values, checked like a new one.

        Raises pydantic.ValidationError for a value that is not allowed. (`model_copy` checks
        nothing.)
        """
        own = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**{**own, **values})


def setting(
    default: Any,
    description: str,
    *,
    affects: tuple[Result, ...] = (),
    path: PathKind | None = None,
    **constraints: Any,
) -> Any:
    """A field of a section; `...` as the default makes it required.

    Args:
        default: its value where a config does not name it.
        description: what it means, with its unit.
        affects: results on disk that are of no use once it has another value.
        path: whether its values name files or folders that are read or written.
        constraints: of pydantic's `Field`, such as ge=0.
    """
    extra: dict[str, Any] = {"affects": list(affects)} | ({"path": path} if path else {})
    return Field(default, description=description, json_schema_extra=extra, **constraints)


def extra_of(section: type[BaseModel], name: str) -> Mapping[str, Any]:
    """What `setting` noted of a field: "affects", and "path" if it is one."""
    extra = section.model_fields[name].json_schema_extra
    return extra if isinstance(extra, dict) else {}


def refusal(template: str) -> PydanticCustomError:
    """An error of a rule.

    Args:
        template: the message. `{at}` stands for the place of the section ("train.late."), `{key}`
            for the setting's own name; other braces must be doubled.
    """
    plain = template.format(at="", key="it")
    return PydanticCustomError("rule", "{plain}", {"template": template, "plain": plain})


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as a string, and an int may stand for a float; a bool may not."""
    if isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


_Item = TypeVar("_Item")
Number = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_number)]
Listed = Annotated[tuple[_Item, ...], BeforeValidator(_tuple)]
