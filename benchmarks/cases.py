"""Figures of many cases, kept in a JSON file as they come."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path


def measured(
    cases: Iterable[tuple], figures: Callable[..., dict], json_file: str | None
) -> dict[str, dict]:
    """Returns the figures of all cases by name, those that the file has from earlier calls too.

    Each case's are printed, and written to the file, as soon as they are there.

    cases: arguments of `figures`; joined by spaces they are a case's name. json_file: None keeps
    nothing.
    """
    path = Path(json_file) if json_file else None
    entries = json.loads(path.read_text()) if path and path.exists() else {}
    for case in cases:
        name = " ".join(map(str, case))
        entries[name] = figures(*case)
        print(name, json.dumps(entries[name]), flush=True)
        if path:
            path.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    return entries
