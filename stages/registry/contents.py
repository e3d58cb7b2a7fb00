"""Content digests of model folders, independent of when and where the files were written."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from stages.errors import ModelError
from stages.json_types import JsonObject
from stages.process.storage import write_json

LARGE_BYTES = 2**20  # smaller files are hashed as fast as they are looked up
SETTLED_SECONDS = 2.0
MEMO_ENTRIES = 10_000

# Pickle-based formats can run code when they are read, so the registry accepts only safetensors.
UNSAFE_SUFFIXES = (".bin", ".pt", ".pkl", ".pth", ".ckpt", ".pickle")
# Keys where transformers and peft record the load path: properties of a machine, not of the model.
MACHINE_KEYS = {
    "config.json": {"_name_or_path", "name_or_path"},
    "generation_config.json": {"_name_or_path", "name_or_path"},
    "tokenizer_config.json": {"_name_or_path", "name_or_path", "tokenizer_file", "special_tokens_map_file", "is_local", "local_files_only"},
}


class Memo:
    """Cache of the hashes of large files and of passed checks, so that planning need not read the files again.

    Only plans use it; a step that runs reads every byte of its inputs. A file counts as unchanged if its size, times and inode are
    unchanged. A file changed a moment ago is not cached, because it could change again within the resolution of its timestamp.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hashes: dict[str, list[int | str]] = {}
        self.passed: list[str] = []  # keys of passed checks
        self._is_new = False
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            self.hashes, self.passed = dict(kept["hashes"]), list(kept["passed"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # it is only a cache

    def sha256(self, path: Path) -> str:
        """Hex SHA-256 of the file. It is computed again if size, times or inode changed."""
        stat = path.stat()
        state = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        kept = self.hashes.get(str(path.absolute()))
        if kept is not None and kept[:4] == state:
            return str(kept[4])
        digest = _sha256(path)
        if max(stat.st_mtime, stat.st_ctime) < time.time() - SETTLED_SECONDS:
            self.hashes[str(path.absolute())] = [*state, digest]
            self._is_new = True
        return digest

    def check_once(self, mark: str, check: Callable[[], None]) -> None:
        """Run ``check`` unless it passed before under the same ``mark``."""
        if mark not in self.passed:
            check()
            self.passed.append(mark)
            self._is_new = True

    def save(self) -> None:
        """Write the cache. Does nothing if the home folder does not exist, because a plan creates nothing, and ignores write errors."""
        if not self._is_new or not self.path.parent.parent.is_dir():
            return
        content = {"hashes": dict(list(self.hashes.items())[-MEMO_ENTRIES:]), "passed": self.passed[-MEMO_ENTRIES:]}
        try:
            self.path.parent.mkdir(exist_ok=True)
            write_json(self.path, content)
        except OSError:
            pass


_memo: ContextVar[Memo | None] = ContextVar("memo", default=None)


@contextmanager
def remembered_hashes(path: Path) -> Iterator[Memo]:
    """Context manager in which ``file_sha256`` takes the hashes of unchanged large files from the cache at ``path``."""
    memo = Memo(path)
    token = _memo.set(memo)
    try:
        yield memo
    finally:
        _memo.reset(token)
        memo.save()


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    memo = _memo.get()
    if memo is not None and path.stat().st_size >= LARGE_BYTES:
        return memo.sha256(path)
    return _sha256(path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def files_of(folder: Path) -> Iterator[tuple[str, Path]]:
    """(relative path with slashes, path) of every file below ``folder``, sorted. Hidden files (.gitattributes, .cache) are skipped."""
    paths = []
    for root, directories, names in os.walk(folder):
        directories[:] = [name for name in directories if not name.startswith(".")]
        paths += [Path(root, name) for name in names if not name.startswith(".")]
    yield from sorted((path.relative_to(folder).as_posix(), path) for path in paths)


def without_local_paths(name: str, content: JsonObject, base: str | None) -> JsonObject:
    """``content`` of the JSON file ``name`` without the paths of the machine that wrote it.

    ``base`` (a digest or Hub id) replaces an adapter's base path; None removes it.
    """
    kept = {key: value for key, value in content.items() if key not in MACHINE_KEYS.get(name, ())}
    if name == "adapter_config.json":
        kept["base_model_name_or_path"] = base
        for key, value in kept.items():  # peft stores module names in sets, whose order differs between processes
            if isinstance(value, list) and all(isinstance(item, str) for item in value):
                kept[key] = sorted(value)
    return kept


def normalised(path: Path, base: str | None) -> bytes | None:
    """The file's bytes without local paths; None if the file has none.

    Raises ModelError if a JSON file that may contain paths cannot be read.
    """
    if path.name not in MACHINE_KEYS and path.name != "adapter_config.json":
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: not readable as JSON ({error}); expected a folder written by save_pretrained") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: contains a {type(content).__name__}, expected an object, as save_pretrained writes it")
    kept = without_local_paths(path.name, content, base)
    return None if kept == content else (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()


def normalise_folder(folder: Path, base: str | None) -> None:
    """Rewrite the JSON files of ``folder`` so that equal models have equal bytes."""
    for _, path in list(files_of(folder)):
        content = normalised(path, base)
        if content is not None:
            path.write_bytes(content)


def digest_of(hashes: dict[str, str]) -> str:
    """``sha256:...`` over (relative path, SHA-256 of the content), sorted by path."""
    lines = "".join(f"{name}\0{content}\n" for name, content in sorted(hashes.items()))
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def digest_folder(folder: Path) -> str:
    """The content digest of any model folder; equal to the registry's digest of a full model with these files."""
    hashes = {}
    for name, path in files_of(folder):
        content = normalised(path, None)
        hashes[name] = file_sha256(path) if content is None else hashlib.sha256(content).hexdigest()
    return digest_of(hashes)
