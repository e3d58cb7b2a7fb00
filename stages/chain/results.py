"""Results and run folder files of steps, stored by fingerprint, so that a reused step has its logs and an evaluation its results.

<home>/results/<fingerprint>/result.json        metrics, evaluation, and the list of files with their SHA-256
<home>/results/<fingerprint>/files/...          the files that the step wrote into its run folder
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import NotRequired, TypedDict

from stages.json_types import JsonObject
from stages.process.storage import write_json
from stages.registry.contents import file_sha256, files_of
from stages.registry.record import FingerprintParts
from stages.run_summary import EvaluationResult


class StoredResult(TypedDict):
    """The content of result.json. ``save_result`` adds ``fingerprint`` and ``files``."""

    name: str  # <recipe>/<step>
    created: str  # ISO 8601, UTC
    fingerprint_parts: FingerprintParts
    metrics: JsonObject
    evaluation: EvaluationResult | None
    circumstances: JsonObject
    fingerprint: NotRequired[str]
    files: NotRequired[list[dict[str, str]]]  # path and sha256 of each file


def save_result(home: Path, fingerprint: str, result: StoredResult, folder: Path) -> None:
    """Store ``result`` and the files of the step's run ``folder`` atomically."""
    target = home / "results" / fingerprint
    staging = home / "results" / f".{uuid.uuid4().hex}"
    (staging / "files").mkdir(parents=True)
    try:
        listed = [(name, path) for name, path in files_of(folder) if not name.startswith("tensorboard/")]
        for name, path in listed:
            _copy(path, staging / "files" / name)
        files = [{"path": name, "sha256": file_sha256(path)} for name, path in listed]
        write_json(staging / "result.json", {**result, "fingerprint": fingerprint, "files": files})
        shutil.rmtree(target, ignore_errors=True)  # it is incomplete, or this step would have been reused
        os.rename(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def load_result(home: Path, fingerprint: str) -> StoredResult | None:
    """The result of a fingerprint; None if it does not exist, or if one of its files is missing or changed."""
    folder = home / "results" / fingerprint
    try:
        result: StoredResult = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    for file in result["files"]:
        path = folder / "files" / file["path"]
        if not path.is_file() or file_sha256(path) != file["sha256"]:
            return None
    return result


def restore_files(home: Path, fingerprint: str, folder: Path) -> None:
    """Copy the files of a stored result into a new run folder."""
    source = home / "results" / fingerprint / "files"
    for name, path in files_of(source):
        _copy(path, folder / name)


def last_result(home: Path, name: str) -> StoredResult | None:
    """The newest stored result of the step ``<recipe>/<step>``."""
    results: list[StoredResult] = []
    for path in (home / "results").glob("*/result.json"):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if result["name"] == name:
            results.append(result)
    return max(results, key=lambda result: result["created"], default=None)


def _copy(source: Path, target: Path) -> None:
    """Copy instead of hard-linking, so that a user's edit in a run folder does not change the stored result."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
