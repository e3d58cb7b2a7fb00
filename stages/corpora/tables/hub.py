"""Data sets of the Hub at one commit: list their splits and columns without downloading rows; download and read the rows.

Only the files of the requested split are downloaded, into the Hub's own cache. From there they can be read offline.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from functools import lru_cache

from stages.config import DataSource
from stages.corpora.rows import Row, column_of
from stages.corpora.tables.formats import EXPECTED, read_file, rows_of_parts, with_locations
from stages.corpora.tables.layout import Layout, Part, find_split, front_matter, is_data, layout_of, parts_of, suffix_of
from stages.errors import DataError, HubUnreachable
from stages.hub.contents import content_digest
from stages.hub.repositories import COMMIT, Repository, fetch, look_up

logger = logging.getLogger(__name__)

DECIDE = ("dataset_dict.json", "state.json")
"""Files besides the data files that assign data files to splits. The configs of a README do so, too."""
TYPED = {".csv": "csv", ".tsv": "csv", ".txt": "text"}
"""Formats that the ``datasets`` library parses into values. In a text file each line is a row."""
ORDER = (".parquet", ".arrow", ".jsonl", ".json", ".csv")  # preference between formats with equal file counts, as in datasets


def commit_of(source: DataSource) -> str:
    """The commit at which a data set is read. Asks the Hub unless the recipe pins a commit."""
    pinned = source.revision is not None and COMMIT.fullmatch(source.revision)
    return str(source.revision) if pinned else repository_of(source).commit


def content_of(source: DataSource) -> str:
    """What a data set contains at its commit: a digest of its data files and of the configs in its README.

    The commit itself if the Hub does not say what the files contain.
    """
    commit = commit_of(source)
    digest = content_digest("dataset", source.hub_id, commit, lambda name: is_data(name) or name in DECIDE)
    if digest is None:
        return commit
    repository = repository_of(source)
    readme = fetch(repository, "README.md").read_text(encoding="utf-8", errors="replace") if "README.md" in repository.files else ""
    configs = front_matter(readme).get("configs")
    return digest if configs is None else f"{digest} {json.dumps(configs, sort_keys=True, default=str)}"


def repository_of(source: DataSource) -> Repository:
    """Look up the repository of a source. Raises HubError if the Hub does not return it."""
    if source.revision is not None and COMMIT.fullmatch(source.revision):
        return _at_commit(source.hub_id, source.revision)
    return look_up("dataset", source.hub_id, source.revision)


@lru_cache(maxsize=64)
def _at_commit(identifier: str, commit: str) -> Repository:
    """Look up the repository at a commit, which cannot change: one request per process."""
    return look_up("dataset", identifier, commit)


def hub_layout(repository: Repository, source: DataSource) -> Layout:
    """The repository's data files by split. Raises DataError if the source selects something that does not exist."""
    files = [source.data_files] if isinstance(source.data_files, str) else source.data_files
    try:
        layout = layout_of(
            repository.files,
            lambda name: fetch(repository, name).read_text(encoding="utf-8", errors="replace"),
            name=source.name,
            data_dir=source.data_dir,
            data_files=files,
        )
    except DataError as error:
        if repository.is_cached:  # the missing file may exist on the Hub
            raise HubUnreachable(_not_downloaded(repository, str(error))) from error
        raise DataError(f"{repository.id}: {error}") from error
    if repository.is_cached and (layout.lost or not any(layout.splits.values())):
        raise HubUnreachable(_not_downloaded(repository, layout.lost or "no data file is there"))
    if any(layout.splits.values()):
        return layout
    kinds = sorted({suffix_of(name) or name for name in repository.files})
    raise DataError(f"{repository.id}: the data set has no file in a supported format (it has {', '.join(kinds[:8])}); expected {EXPECTED}")


def check_source(repository: Repository, source: DataSource, split: str) -> None:
    """Raise DataError if the config, the split or a renamed column does not exist. No rows are downloaded.

    ``split`` is the default for a source that names none. Columns are checked if the README lists them.
    """
    chosen_files(repository, source, split)
    columns = _declared_columns(repository, source)
    for ours, theirs in source.columns.items():
        if columns and column_of(theirs, columns) not in columns:
            raise DataError(f"{repository.id}: columns names {theirs!r} for {ours!r}, and the data set has {', '.join(columns)}")


def chosen_files(repository: Repository, source: DataSource, split: str) -> list[str]:
    """The files that the source reads. Raises DataError if its split does not exist."""
    layout = hub_layout(repository, source)
    return [name for part in _chosen_parts(repository, layout, source, split) for name in layout.splits[part.split]]


def _chosen_parts(repository: Repository, layout: Layout, source: DataSource, split: str) -> list[Part]:
    """The parts that the source's split selects. As in ``datasets``, a Hub data set without splits counts as "train"."""
    try:
        if source.split is None and source.data_files is None:
            return [Part(find_split(layout, split, is_default=True))]
        return parts_of(layout, source.split, split)
    except DataError as error:
        if repository.is_cached:
            raise HubUnreachable(_not_downloaded(repository, str(error))) from error
        raise DataError(f"{repository.id}: {error}") from error


def _not_downloaded(repository: Repository, reason: str) -> str:
    return (
        f"the data set {repository.id!r} is in the local cache in part ({reason}), and HF_HUB_OFFLINE is set; unset it, or download the "
        f"rest: hf download {repository.id} --repo-type dataset --revision {repository.commit}"
    )


def _declared_columns(repository: Repository, source: DataSource) -> list[str]:
    """The columns that the README lists for the config; empty if it lists none."""
    if "README.md" not in repository.files or source.data_dir is not None or source.data_files is not None:
        return []
    infos = front_matter(fetch(repository, "README.md").read_text(encoding="utf-8", errors="replace")).get("dataset_info")
    listed = infos if isinstance(infos, list) else [infos]
    known = {info.get("config_name", "default"): info for info in listed if isinstance(info, dict)}
    info = known.get(source.name or "default") or (next(iter(known.values())) if len(known) == 1 else {})
    return [str(item["name"]) for item in info.get("features") or () if isinstance(item, dict) and "name" in item]


def read_hub(source: DataSource, split: str) -> Iterator[Row]:
    """Rows of a Hub data set, from the split that the source names, else from ``split``.

    Raises HubError if the Hub does not return the data set, and DataError if it cannot be read.
    """
    repository = repository_of(source)
    layout = hub_layout(repository, source)
    if layout.lost:
        logger.warning("%s: %s; only the existing files are read", repository.id, layout.lost)
    parts = _chosen_parts(repository, layout, source, split)
    format_read = _one_format(repository, [name for part in parts for name in layout.splits[part.split]])
    only = Layout(
        {name: [file for file in of_split if suffix_of(file) == format_read] for name, of_split in layout.splits.items()},
        layout.names_splits,
    )
    return rows_of_parts(only, parts, lambda name: _read_one(repository, name))


def _one_format(repository: Repository, files: Sequence[str]) -> str:
    """The format of most files, because many data sets publish the same rows in several formats. Logs the skipped files."""
    suffixes = [suffix_of(name) for name in files]
    most = max(dict.fromkeys(suffixes), key=lambda suffix: (suffixes.count(suffix), -(ORDER.index(suffix) if suffix in ORDER else 9)))
    others = [name for name in files if suffix_of(name) != most]
    if others:
        logger.warning("%s: reading its %s files; %d other files are skipped, e.g. %s", repository.id, most, len(others), others[0])
    return most


def _read_one(repository: Repository, name: str) -> Iterator[Row]:
    path, shown = fetch(repository, name), f"{repository.id}, {name}"
    module = TYPED.get(suffix_of(name))
    if module is None:
        yield from read_file(path, shown)
        return
    from datasets import Dataset

    try:
        if module == "csv":
            table = Dataset.from_csv(str(path), sep="\t" if suffix_of(name) == ".tsv" else ",")
        else:
            table = Dataset.from_text(str(path))
    except Exception as error:  # datasets raises many exception types
        reason = str(error.__cause__ or error).strip().split("\n")[0][:300]
        raise DataError(f"{shown}: cannot be read as {module} ({type(error).__name__}: {reason})") from error
    yield from with_locations(table, shown)
