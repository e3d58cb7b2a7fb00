"""Find the data files of a folder or Hub repository, and assign each one to a split.

The rules are those of the ``datasets`` library: the ``configs`` in a README's front matter, names such as
``data/train-00000-of-00002.parquet``, folder and file names with a split keyword (``train/``, ``dev.jsonl``), and folders written by
``save_to_disk``. If nothing names a split, all files belong to ``train``.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.errors import DataError, some_of
from stages.json_types import JsonObject

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
PACKED = (".gz", ".zst", ".bz2", ".xz")
OTHER_TABLES = (
    ".xlsx",
    ".xls",
    ".ods",
    ".orc",
    ".avro",
    ".feather",
    ".sqlite",
    ".db",
    ".pkl",
    ".xml",
    ".zip",
    ".tar",
    ".tgz",
    ".7z",
    ".rar",
)
"""Formats that may hold rows, and are not read."""
UNSPLIT = "train"
"""The split of all files if nothing names one."""
ABOUT = re.compile(r"(?i)(readme|licen[cs]e|notice|copying|changelog|citation|contributing|requirements|authors)\b.*")
NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")


@dataclass(frozen=True)
class Layout:
    """The data files of a folder or repository by split. Names are relative paths with slashes, sorted."""

    splits: dict[str, list[str]]
    names_splits: bool  # False: nothing distinguishes splits
    unread: list[str] = field(default_factory=list)  # data files that belong to no split
    is_declared: bool = False  # by a README or save_to_disk: files that it does not list are left out on purpose
    lost: str = ""  # message about missing shards (x-00000-of-00003); empty if none is missing
    other: list[str] = field(default_factory=list)  # files in formats that may hold rows, and are not read, if nothing chose the files


def is_data(name: str) -> bool:
    """Whether the file ``name`` (a relative path with slashes) contains rows. Decided by the name alone."""
    path = PurePosixPath(name)
    if any(part.startswith((".", "__")) for part in path.parts) or path.name in NO_DATA:
        return False
    return suffix_of(name) in SUFFIXES and not ABOUT.fullmatch(path.name)


def suffix_of(name: str) -> str:
    """``.jsonl`` for ``a.jsonl`` and for ``a.jsonl.gz``; in lower case."""
    path = PurePosixPath(name.lower())
    return PurePosixPath(path.stem).suffix if path.suffix in PACKED else path.suffix


def layout_of(
    names: Iterable[str],
    read: Callable[[str], str],
    *,
    name: str | None = None,
    data_dir: str | None = None,
    data_files: Sequence[str] | None = None,
) -> Layout:
    """The layout of the files ``names``. ``read`` returns the text of a small file (README.md and similar).

    ``name`` selects a config of the README, ``data_dir`` a folder, ``data_files`` files by pattern. Raises DataError (without a location)
    if a selection matches nothing.
    """
    names = sorted(names)
    if data_dir is not None:
        return _within(data_dir, names, read, name, data_files)
    if data_files is not None:
        chosen = _matching([name for name in names if is_data(name)], data_files, f"data_files: {', '.join(data_files)}")
        layout = _by_names(chosen)
        return layout if layout.names_splits and not layout.unread else Layout({UNSPLIT: chosen}, False)
    configs = _configs(read("README.md")) if "README.md" in names else {}
    if configs:
        return _declared(names, configs, _config_name(configs, name))
    if name is not None and name != "default":
        folders = sorted({PurePosixPath(other).parts[0] for other in names if "/" in other and is_data(other)})
        advice = f"; write data_dir: {name}" if name in folders else f"; its folders, for data_dir: {', '.join(folders) or 'none'}"
        raise DataError(f"there is no config {name!r}: the data set has no configs{advice}")
    other = [name for name in names if suffix_of(name) in OTHER_TABLES]
    return _saved(names, read) or replace(_by_names([name for name in names if is_data(name)]), other=other)


def _within(folder: str, names: list[str], read: Callable[[str], str], config: str | None, data_files: Sequence[str] | None) -> Layout:
    """The layout of the files below ``folder``."""
    if config is not None:
        raise DataError(f"name: {config} and data_dir: {folder} both select a part of the data set; remove one of them")
    start = folder.strip("/").removeprefix("./") + "/"
    below = [name.removeprefix(start) for name in names if name.startswith(start) and name != f"{start}README.md"]
    if not any(is_data(name) for name in below):
        folders = sorted({str(PurePosixPath(name).parent) for name in names if "/" in name and is_data(name)})
        raise DataError(f"data_dir: {folder} contains no data file; {_nearest(folder.strip('/'), folders, 'folders with data')}")
    inner = layout_of(below, lambda name: read(start + name), data_files=data_files)
    splits = {split: [start + name for name in files] for split, files in inner.splits.items()}
    unread, other = ([start + name for name in files] for files in (inner.unread, inner.other))
    return replace(inner, splits=splits, unread=unread, other=other)


# Configs declared in a README


def front_matter(readme: str) -> JsonObject:
    """The YAML block at the start of a README; empty if there is none or it cannot be parsed."""
    match = re.match(r"\s*---\s*\n(.*?)\n---", readme, re.DOTALL)
    if match is None:
        return {}
    try:
        content = YAML(typ="safe").load(match[1])
    except YAMLError:
        return {}
    return content if isinstance(content, dict) else {}


def _configs(readme: str) -> dict[str, JsonObject]:
    listed = front_matter(readme).get("configs")
    entries = listed if isinstance(listed, list) else []
    return {str(entry["config_name"]): entry for entry in entries if isinstance(entry, dict) and "config_name" in entry}


def _config_name(configs: Mapping[str, JsonObject], wanted: str | None) -> str:
    if wanted is not None:
        if wanted not in configs:
            raise DataError(f"there is no config {wanted!r}; {_nearest(wanted, configs, 'its configs')}")
        return wanted
    default = [name for name, config in configs.items() if config.get("default") or name == "default" or len(configs) == 1]
    if len(default) != 1:
        raise DataError(f"it has several configs; choose one with name: {', '.join(configs)}")
    return default[0]


def _declared(names: list[str], configs: Mapping[str, JsonObject], name: str) -> Layout:
    config = configs[name]
    start = f"{str(config['data_dir']).strip('/')}/" if config.get("data_dir") else ""
    below = [other.removeprefix(start) for other in names if other.startswith(start) and is_data(other)]
    declared = config.get("data_files")
    if declared is None:
        by_name = _by_names(below)
        splits, named = by_name.splits, by_name.names_splits
    else:
        entries = declared if isinstance(declared, list) else [declared]
        splits, named = {}, False
        for entry in entries:
            split, patterns = (str(entry.get("split", UNSPLIT)), entry.get("path")) if isinstance(entry, dict) else (UNSPLIT, entry)
            named |= isinstance(entry, dict)
            files = _matching(
                below,
                [patterns] if isinstance(patterns, str) else [str(one) for one in patterns] if isinstance(patterns, list) else [],
                None,
            )
            splits.setdefault(split, []).extend(files)
    lost = _lost_shards([other for files in splits.values() for other in files])
    return Layout({split: [start + other for other in files] for split, files in splits.items()}, named, is_declared=True, lost=lost)


# Folders written by save_to_disk


def _saved(names: list[str], read: Callable[[str], str]) -> Layout | None:
    """The layout of a folder written by ``DatasetDict.save_to_disk`` or ``Dataset.save_to_disk``; None for any other folder."""
    try:
        if "dataset_dict.json" in names:
            splits = [str(split) for split in json.loads(read("dataset_dict.json"))["splits"]]
            return Layout({split: _arrow_files(names, read, f"{split}/") for split in splits}, True, is_declared=True)
        if "state.json" in names and any(name.endswith(".arrow") for name in names):
            split = json.loads(read("state.json")).get("_split") or UNSPLIT
            return Layout({str(split): _arrow_files(names, read, "")}, False, is_declared=True)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"the folder was written by save_to_disk, but its JSON files are damaged ({error})") from error
    return None


def _arrow_files(names: list[str], read: Callable[[str], str], start: str) -> list[str]:
    """The files listed in state.json. Others (cache-*.arrow) are left over from transformations."""
    files = [f"{start}{item['filename']}" for item in json.loads(read(f"{start}state.json"))["_data_files"]]
    lost = [name for name in files if name not in names]
    if lost:
        raise DataError(f"{start}state.json lists {lost[0]}, which is missing; copy the complete folder")
    return files


# Splits from file names


def _by_names(names: list[str]) -> Layout:
    """The layout by the patterns of ``datasets``. The first kind of pattern that matches any file is used."""
    from datasets.data_files import ALL_DEFAULT_PATTERNS, DEFAULT_PATTERNS_ALL, DEFAULT_SPLITS, SPLIT_PATTERN_SHARDED
    from datasets.utils.py_utils import string_to_dict

    shards: dict[str, list[str]] = {}
    for name in _matching(names, [SPLIT_PATTERN_SHARDED.replace("{split}", "*")], None):
        parts = string_to_dict(PurePosixPath(name).name, PurePosixPath(SPLIT_PATTERN_SHARDED).name)
        shards.setdefault(str((parts or {}).get("split", UNSPLIT)), []).append(name)
    if shards:
        usual = [str(split) for split in DEFAULT_SPLITS]
        order = sorted(shards, key=lambda split: (usual.index(split) if split in usual else len(usual), split))
        lost = _lost_shards([name for files in shards.values() for name in files])
        return Layout({split: shards[split] for split in order}, True, _rest(names, shards), lost=lost)
    for patterns in ALL_DEFAULT_PATTERNS:
        if patterns is DEFAULT_PATTERNS_ALL:
            break
        by_split = {str(split): _matching(names, of_split, None, any_case=True) for split, of_split in patterns.items()}
        splits = {split: files for split, files in by_split.items() if files}
        if splits:
            taken = [name for files in splits.values() for name in files]
            if twice := next((name for name, count in Counter(taken).items() if count > 1), None):
                of = " and ".join(split for split, files in splits.items() if twice in files)
                raise DataError(f"the file name {twice} matches the splits {of}; choose files with data_dir or data_files")
            return Layout(splits, True, _rest(names, splits), lost=_lost_shards(taken))
    return Layout({UNSPLIT: names} if names else {}, False, lost=_lost_shards(names))


def _lost_shards(names: Sequence[str]) -> str:
    """A message about missing shards (``x-00000-of-00003`` exists, another of its series does not); empty if none is missing."""
    series: dict[tuple[str, int, str], set[int]] = {}
    for name in names:
        if match := re.fullmatch(r"(.*-)(\d{5})-of-(\d{5})(.*)", name):
            # a hash may follow, different for each file
            series.setdefault((match[1], int(match[3]), suffix_of(name)), set()).add(int(match[2]))
    for (start, count, suffix), shards in series.items():
        lost = sorted(set(range(count)) - shards)
        if lost:
            example = f"{start}{lost[0]:05d}-of-{count:05d}{suffix}"
            return f"{len(lost)} of {count} files are missing, e.g. {example}"
    return ""


def _rest(names: list[str], splits: Mapping[str, list[str]]) -> list[str]:
    taken = {name for files in splits.values() for name in files}
    return [name for name in names if name not in taken]


def _matching(names: list[str], patterns: Sequence[str], what: str | None, *, any_case: bool = False) -> list[str]:
    """The names that match any pattern, sorted, without duplicates. Raises DataError if a pattern of ``what`` matches none."""
    from fsspec.utils import glob_translate

    flags = re.IGNORECASE if any_case else 0
    try:
        compiled = [re.compile(glob_translate(pattern.removeprefix("./")), flags) for pattern in patterns]
    except (ValueError, re.error) as error:
        raise DataError(f"{what or 'configs'}: not a valid file name pattern ({error})") from error
    if what is not None:
        for pattern, regex in zip(patterns, compiled, strict=True):
            if not any(regex.match(name) for name in names):
                raise DataError(f"{what}: no data file matches {pattern!r}; {_nearest(pattern, names, 'data files')}")
    return [name for name in names if any(regex.match(name) for regex in compiled)]


def _nearest(wanted: str, known: Iterable[str], what: str) -> str:
    choices = list(known)
    near = difflib.get_close_matches(wanted, choices, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"{what}: {some_of(choices, 10) or 'none'}"


# Choosing a split


def canonical(split: str) -> str:
    """The usual name of a split: ``validation`` for ``val``, ``valid`` and ``dev``; ``test`` for ``eval``; others are unchanged."""
    from datasets.data_files import SPLIT_KEYWORDS

    return next((str(name) for name, words in SPLIT_KEYWORDS.items() if split in words), split)


def find_split(layout: Layout, wanted: str, *, is_default: bool = False) -> str:
    """The split of ``layout`` that ``wanted`` names: an exact match, else the only split with the same meaning (val, validation).

    Raises DataError if there is none. ``is_default``: the recipe names no split.
    """
    if wanted in layout.splits:
        return wanted
    alike = [split for split in layout.splits if canonical(split) == canonical(wanted)]
    if len(alike) == 1:
        return alike[0]
    if not layout.names_splits and not is_default:
        raise DataError(
            f"there is no split {wanted!r}: the file names contain no splits, and all rows are {UNSPLIT!r}; choose rows with skip "
            "and limit, or files with data_files"
        )
    reason = " (the default here; set split to read another)" if is_default else ""
    known = f"its splits: {', '.join(layout.splits)}" if is_default else _nearest(wanted, layout.splits, "its splits")
    raise DataError(f"there is no split {wanted!r}{reason}; {known}")


@dataclass(frozen=True)
class Part:
    """One term of a split expression: a split, and a row slice as written (``[:20]``, ``[10%:]``); an empty slice means all rows."""

    split: str
    written_slice: str = ""

    def rows(self, count: int) -> range:
        """The row indices that the slice selects from ``count`` rows. Raises DataError for an invalid slice."""
        if not self.written_slice:
            return range(count)
        from datasets import ReadInstruction

        try:
            (absolute,) = ReadInstruction.from_spec(self.split + self.written_slice).to_absolute({self.split: count})
        except (ValueError, AssertionError) as error:
            reason = str(error).split("\n")[0]
            written = self.split + self.written_slice
            raise DataError(f"split: {written} cannot be read ({reason}); expected train[:20] or train[10%:20%]") from error
        return range(absolute.from_ or 0, count if absolute.to is None else absolute.to)


def parts_of(layout: Layout, written: str | None, default: str) -> list[Part]:
    """The parts that a source's ``split`` selects: ``train``, ``train[:20]``, ``train+test`` or ``all``; None means ``default``.

    If the source names no split and the layout has none, all rows are read. Raises DataError for another form.
    """
    if written == "all" or (written is None and not layout.names_splits):
        return [Part(split) for split in layout.splits]
    if written is None:
        return [Part(find_split(layout, default, is_default=True))]
    parts = []
    for term in written.split("+"):
        match = re.fullmatch(r"\s*([\w.-]+)\s*(\[.*\])?\s*", term)
        if match is None:
            raise DataError(f"split: {written} cannot be read; expected a name, or train[:20], train[10%:20%], train+test")
        parts.append(Part(find_split(layout, match[1]), match[2] or ""))
    return parts
