"""Counters of the server in the text format of Prometheus (version 0.0.4), without its client."""

import threading
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
WINDOW = 10.0  # seconds over which beagle_tokens_per_second counts


@dataclass
class Histogram:
    """Observations in seconds, counted in buckets."""

    name: str
    purpose: str
    counts: list[int] = field(default_factory=lambda: [0] * (len(SECONDS) + 1))
    total: float = 0.0

    def add(self, seconds: float) -> None:
        """Counts one observation."""
        self.counts[bisect_left(SECONDS, seconds)] += 1
        self.total += seconds

    def lines(self) -> Iterator[str]:
        """In the format of Prometheus, whose buckets hold all smaller observations too."""
        yield from _head(self.name, self.purpose, "histogram")
        so_far = 0
        for bound, count in zip((*SECONDS, "+Inf"), self.counts, strict=True):
            so_far += count
            yield f'{self.name}_bucket{{le="{bound}"}} {so_far}'
        yield f"{self.name}_sum {self.total:.6f}"
        yield f"{self.name}_count {so_far}"


class Metrics:
    """What a server counts. Every method may be called from every thread."""

    def __init__(self, rows: int, depth: int) -> None:
        """rows: of the engine. depth: most drafts that a round can accept."""
        self.began = time.time()
        self._lock = threading.Lock()
        self._rows = rows
        self.gauges: dict[str, Callable[[], int]] = {}  # "waiting", "running": read when shown
        self._requests: Counter[tuple[str, int]] = Counter()
        self._finishes: Counter[str] = Counter()
        self._prompt_tokens = self._tokens = self._rounds = self._accepted = 0
        self._reached = [0] * depth  # rounds that accepted depth 1, 2, .. P
        self._recent: deque[tuple[float, int]] = deque()
        self._first = Histogram(
            "beagle_time_to_first_token_seconds", "from a request's arrival to its first token"
        )
        self._between = Histogram(
            "beagle_time_between_tokens_seconds", "mean time of a token in a piece after the first"
        )
        self._queued = Histogram("beagle_queue_seconds", "from a request's arrival to its row")
        self._whole = Histogram("beagle_answer_seconds", "from a request's arrival to its end")

    def request(self, path: str, status: int) -> None:
        """Counts an HTTP request."""
        with self._lock:
            self._requests[path, status] += 1

    def admitted(self, prompt_tokens: int, waited: float) -> None:
        """Counts an answer that got a row."""
        with self._lock:
            self._prompt_tokens += prompt_tokens
            self._queued.add(waited)

    def piece(self, tokens: int, accepted: Sequence[int], since: float, first: bool) -> None:
        """Counts new tokens of an answer. since: seconds after its arrival or its last piece."""
        now = time.monotonic()
        with self._lock:
            self._tokens += tokens
            self._rounds += len(accepted)
            self._accepted += sum(accepted)
            for drafts in accepted:
                for depth in range(drafts):
                    self._reached[depth] += 1
            self._recent.append((now, tokens))
            self._forget(now)
            (self._first if first else self._between).add(since if first else since / tokens)

    def ended(self, finish: str, seconds: float) -> None:
        """Counts an answer that ended."""
        with self._lock:
            self._finishes[finish] += 1
            self._whole.add(seconds)

    def text(self) -> str:
        """The page that Prometheus reads."""
        with self._lock:
            return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        yield from _head("beagle_requests_total", "HTTP requests", "counter")
        for (path, status), count in sorted(self._requests.items()):
            yield f'beagle_requests_total{{path="{path}",status="{status}"}} {count}'
        yield from _head("beagle_answers_total", "answers by the reason of their end", "counter")
        for finish, count in sorted(self._finishes.items()):
            yield f'beagle_answers_total{{finish="{finish}"}} {count}'
        for name, purpose, value in (
            ("prompt_tokens", "tokens of prompts", self._prompt_tokens),
            ("completion_tokens", "tokens of answers", self._tokens),
            ("rounds", "rounds of answers", self._rounds),
            ("accepted_draft_tokens", "drafted tokens that were accepted", self._accepted),
        ):
            yield from _counter(f"beagle_{name}_total", purpose, value)
        purpose = "rounds that accepted a draft at this depth; over beagle_rounds_total: its share"
        yield from _head("beagle_rounds_accepting_total", purpose, "counter")
        for depth, count in enumerate(self._reached, 1):
            yield f'beagle_rounds_accepting_total{{depth="{depth}"}} {count}'
        yield from self._gauges()
        for histogram in (self._first, self._between, self._queued, self._whole):
            yield from histogram.lines()

    def _gauges(self) -> Iterator[str]:
        now = time.monotonic()
        self._forget(now)
        speed = sum(tokens for _, tokens in self._recent) / WINDOW
        per_round = 1 + self._accepted / self._rounds if self._rounds else 1.0
        values = {
            "beagle_rows": ("answers that are decoded at the same time at most", self._rows),
            "beagle_rows_running": ("answers that are decoded now", self.gauges["running"]()),
            "beagle_waiting": ("answers that wait for a row", self.gauges["waiting"]()),
            "beagle_tokens_per_second": (f"in the last {WINDOW:.0f} seconds", round(speed, 3)),
            "beagle_tokens_per_round": ("accepted drafts and one more", round(per_round, 4)),
        }
        for name, (purpose, value) in values.items():
            yield from _head(name, purpose, "gauge")
            yield f"{name} {value}"

    def _forget(self, now: float) -> None:
        while self._recent and now - self._recent[0][0] > WINDOW:
            self._recent.popleft()


def _head(name: str, purpose: str, kind: str) -> Iterator[str]:
    yield f"# HELP {name} {purpose}"
    yield f"# TYPE {name} {kind}"


def _counter(name: str, purpose: str, value: int) -> Iterator[str]:
    yield from _head(name, purpose, "counter")
    yield f"{name} {value}"
