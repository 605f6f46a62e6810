"""Typed access to the metadata of a GGUF file."""

from pathlib import Path
from typing import Any

from beagle_jax.errors import UserError


class Metadata:
    """Keys and values of one file.

    Raises:
      UserError: a value is missing or has the wrong type. The message names the file and the key.
    """

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path, self._values = path, values

    def get(self, key: str, default: Any = None) -> Any:
        """Returns the value of a key, or the default if the file lacks it."""
        return self._values.get(key, default)

    def need(self, key: str) -> Any:
        """Returns the value of a required key."""
        value = self.get(key)
        if value is None:
            raise UserError(
                f"{self.path}: GGUF metadata lacks {key!r}; use a file made by llama.cpp's "
                "converter"
            )
        return value

    def list(self, key: str) -> list[Any]:
        """Returns the value of a key that holds a list."""
        value = self.need(key)
        if not isinstance(value, list):
            raise UserError(
                f"{self.path}: GGUF metadata {key!r} is {value!r}, expected a list; download "
                "the file again"
            )
        return value

    def uniform(self, key: str, default: Any = None) -> Any:
        """Returns a value that may be given per layer, if all layers have the same."""
        value = self.get(key, default)
        if not isinstance(value, list):
            return value
        if not value or any(item != value[0] for item in value):
            raise UserError(
                f"{self.path}: GGUF metadata {key!r} differs from layer to layer ({value}), which "
                "this version does not support"
            )
        return value[0]

    def number(self, key: str, default: float | None = None) -> float | None:
        """Returns a number, or the default if the file lacks the key."""
        value = self.get(key, default)
        if value is not None and type(value) not in (int, float):
            raise UserError(f"{self.path}: GGUF metadata {key!r} is {value!r}, expected a number")
        return value

    def token_id(self, name: str, count: int) -> int | None:
        """Returns the id of a special token (`eos`, `bos`, ..), less than `count`.

        Returns None if the file does not name the token.
        """
        key = f"tokenizer.ggml.{name}_token_id"
        value = self.get(key)
        if value is not None and (type(value) is not int or not 0 <= value < count):
            raise UserError(
                f"{self.path}: {key} is {value!r}, and there are {count} tokens; download it again"
            )
        return value
