"""API keys of the server: from a file or the environment, compared in constant time."""

import hashlib
import hmac
import ipaddress
import os
from dataclasses import dataclass, field
from pathlib import Path

from beagle_jax.config import ServeConfig
from beagle_jax.errors import UserError

VARIABLE = "BEAGLE_JAX_API_KEY"  # keys, separated by white space
SHORTEST = 16  # characters of a key


@dataclass(frozen=True)
class Keys:
    """The keys that open the server. Only their digests stay in memory."""

    digests: tuple[bytes, ...] = field(repr=False)

    def __bool__(self) -> bool:
        return bool(self.digests)

    def open_with(self, authorization: str) -> bool:
        """Whether the header `Authorization` holds one of the keys. True without any key.

        Takes the same time for every header: each digest is compared, and as a whole.
        """
        scheme, _, key = authorization.partition(" ")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, known) for known in self.digests]
        return not self.digests or (scheme.lower() == "bearer" and any(matches))


def keys_of(serve: ServeConfig) -> Keys:
    """Reads the keys.

    Raises:
        UserError: the file cannot be read or has no key, a key is too short or not ASCII, or
            another address than this machine's own is to be bound without a key.
    """
    if serve.api_key_file is not None:
        place = f"serve.api_key_file: {serve.api_key_file}"
        try:
            text = Path(serve.api_key_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{place} cannot be read: {error}; expected a text file") from error
        if not text.split():
            raise UserError(f"{place} holds no key; write one a line, or set it to null")
    else:
        place, text = VARIABLE, os.environ.get(VARIABLE, "")
    keys = text.split()
    if any(len(key) < SHORTEST for key in keys):
        raise UserError(
            f"{place} holds a key of fewer than {SHORTEST} characters; make one with "
            'python -c "import secrets; print(secrets.token_urlsafe(32))"'
        )
    if not all(key.isascii() for key in keys):
        raise UserError(f"{place} holds a key that is not ASCII, which clients cannot send")
    if not keys and not is_loopback(serve.host):
        raise UserError(
            f"serve.host is {serve.host}, which other machines can reach, and there is no API "
            f"key; set serve.api_key_file or the variable {VARIABLE}, or serve.host to 127.0.0.1"
        )
    return Keys(tuple(_digest(key) for key in keys))


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
