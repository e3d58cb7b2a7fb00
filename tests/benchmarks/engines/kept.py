"""Finished measurements in a JSON file, so that an interrupted benchmark continues with the missing ones."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from stages.process.hardware import cpu_name

Row = dict[str, Any]


class Kept:
    """The rows of one benchmark. A row has the fields of its key, the measured values and the machine."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []

    def has(self, key: Mapping[str, object]) -> bool:
        """Whether a row with these fields is finished."""
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.rows)

    def once(self, key: Mapping[str, object], measure: Callable[[], Mapping[str, object]]) -> None:
        """Measure and save the row with this key, unless it is finished."""
        if self.has(key):
            return
        began = time.strftime("%H:%M:%S", time.gmtime())
        measured = measure()
        self.rows.append({**key, **measured, "machine": {**machine(), "began_utc": began}})
        unfinished = self.path.with_suffix(".new")
        unfinished.write_text("[\n" + ",\n".join(json.dumps(row) for row in self.rows) + "\n]\n", encoding="utf-8")
        unfinished.replace(self.path)
        shown = {name: value for name, value in measured.items() if not isinstance(value, list | dict)}
        print(time.strftime("%H:%M:%S"), json.dumps({**key, **shown}), flush=True)


def machine() -> Row:
    """The processor, the cores that this process may use, its threads, and the load of the machine (1 minute, all cores)."""
    return {
        "cpu": cpu_name(),
        "cores": sorted(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
    }
