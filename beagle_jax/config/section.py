"""Base of all sections of a config: frozen, strict, and validated by pydantic."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from beagle_jax.config.paths import PathKind, home

# Results on disk that are reused only if the settings that decide them are unchanged: the training
# text and its states, the checkpoints of a stage, the answers of an evaluation, and the taus that
# training compares.
Result = Literal["text", "stage", "answers", "tau"]


class Section(BaseModel):
    """A section of a config. It cannot be changed; `changed` gives another one.

    Building one checks it: pydantic.ValidationError says what is wrong.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _expand_home(cls, values: Any) -> Any:
        """Replaces ~ in files and folders, also of sections that are built in Python."""
        if not isinstance(values, Mapping):
            return values
        named = [name for name in values if name in cls.model_fields]
        paths = [name for name in named if extra_of(cls, name).get("path")]
        return {**values, **{name: _at_home(values[name]) for name in paths}}

    def changed(self, **values: Any) -> Self:
        """Returns this section with other values, validated like a new section.

        `model_copy` validates nothing.

        Raises:
            pydantic.ValidationError: a value is not allowed.
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
    """Declares a field of a section.

    Args:
        default: value if a config does not set it; `...` makes the field required.
        description: meaning and unit.
        affects: results on disk that become invalid if the value changes.
        path: "input" or "output" if the values are files or folders that are read or written.
        constraints: of pydantic's `Field`, for example ge=0.
    """
    extra: dict[str, Any] = {"affects": list(affects)} | ({"path": path} if path else {})
    return Field(default, description=description, json_schema_extra=extra, **constraints)


def extra_of(section: type[BaseModel], name: str) -> Mapping[str, Any]:
    """Returns the "affects" of a field, and its "path" if it has one, as given to `setting`."""
    extra = section.model_fields[name].json_schema_extra
    return extra if isinstance(extra, dict) else {}


def refusal(template: str) -> PydanticCustomError:
    """Returns the error of a validation rule.

    Args:
        template: the message. `{at}` stands for the place of the section ("train.late."), `{key}`
            for the dotted key of the setting; other braces must be doubled.
    """
    plain = template.format(at="", key="it")
    return PydanticCustomError("rule", "{plain}", {"template": template, "plain": plain})


def _at_home(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_at_home, value))
    return home(value) if isinstance(value, str) and value.startswith("~") else value


def _number(value: Any) -> Any:
    """Converts an int or a numeric string to float: YAML 1.1 reads 1e-3 as a string."""
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
