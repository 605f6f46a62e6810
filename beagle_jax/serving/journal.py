"""The log of requests: one JSON object a line. Prompts and answers only on request."""

import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from beagle_jax.serving.choice import Choice
from beagle_jax.serving.metrics import Metrics
from beagle_jax.serving.ticket import Ticket

_log = logging.getLogger(__name__)

# Paths that the metrics count by their name; a client may make up any number of others.
COUNTED = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics", "/")
_LONGEST_PATH = 200  # characters in a line


@dataclass
class Journal:
    """Writes lines to a stream, and counts requests."""

    metrics: Metrics
    texts: bool = False  # also what was asked and answered
    stream: TextIO = field(default_factory=lambda: sys.stdout)
    _broken: bool = field(default=False, init=False)

    def line(self, line: str) -> None:
        """Writes a line. Where nobody reads them any more, it warns once and goes on."""
        try:
            self.stream.write(line + "\n")
            self.stream.flush()
        except (OSError, ValueError) as error:  # a broken pipe, a full disk, a closed stream
            if not self._broken:
                _log.warning("the log of requests cannot be written: %s", error)
            self._broken = True

    def entry(self, path: str) -> "Entry":
        """A line about a request that arrived now."""
        return Entry(self, path)


@dataclass
class Entry:
    """The line of one request."""

    journal: Journal
    path: str
    arrived: float = field(default_factory=time.monotonic)
    details: dict[str, Any] = field(default_factory=dict)
    written: bool = False

    def answers(self, tickets: Sequence[Ticket], choices: Sequence[Choice]) -> None:
        """Adds the measures of a request's answers, whole or not."""
        counts = [choice.usage() for choice in choices]
        began = [ticket.began - ticket.arrived for ticket in tickets if ticket.began is not None]
        finishes = [choice.answer.finish if choice.answer else None for choice in choices]
        self.details |= {
            "prompt_tokens": sum(
                len(ticket.request.tokens) for ticket in tickets if not ticket.request.choice
            ),
            "completion_tokens": sum(tokens for tokens, _, _ in counts),
            "accepted_draft_tokens": sum(accepted for _, accepted, _ in counts),
            "rounds": sum(rounds for _, _, rounds in counts),
            "queue_seconds": round(max(began), 4) if began else None,
            "finish": finishes,
        }
        if self.journal.texts:
            self.details["answers"] = [choice.text for choice in choices]

    def write(self, status: int) -> None:
        """Writes the line. status: of HTTP; 499: the client left before its answer was whole.

        Only the first call counts.
        """
        if self.written:
            return
        self.written = True
        path = self.path if self.path in COUNTED else "other"
        self.journal.metrics.request(path, status)
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "path": self.path[:_LONGEST_PATH],
            "status": status,
            "seconds": round(time.monotonic() - self.arrived, 4),
            **self.details,
        }
        self.journal.line(json.dumps(line))
