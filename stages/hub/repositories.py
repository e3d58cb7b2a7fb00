"""Hub repositories: the commit of a revision, the file list, and single small files.

All requests go through ``_asked``, which retries for a few seconds and converts client errors to one message. With ``HF_HUB_OFFLINE=1`` no
request is made; the local cache is used, at its commit.
"""

from __future__ import annotations

import errno
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from httpx2 import TransportError

from stages.errors import HubError, HubMissing, HubUnreachable, StorageError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

T = TypeVar("T")
Kind = Literal["model", "dataset"]
NOUNS = {"model": "model", "dataset": "data set"}
SMALL = ("config.json", ".index.json", ".md")
COMMIT = re.compile(r"[0-9a-f]{40}")
PAUSES = (1.0, 2.0)
"""Seconds between attempts to reach the Hub."""
TIMEOUT = 10.0
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
BUSY = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Repository:
    """A model or data set of the Hub at one commit."""

    kind: Kind
    id: str  # owner/name
    commit: str
    files: tuple[str, ...]  # paths with slashes, sorted
    is_cached: bool = False  # from the local cache only: ``files`` are the downloaded ones

    @property
    def ref(self) -> str:
        """``owner/name@commit``."""
        return f"{self.id}@{self.commit}"

    @property
    def page(self) -> str:
        """The URL of its web page."""
        return _page(self.kind, self.id)


def look_up(kind: Kind, identifier: str, revision: str | None = None) -> Repository:
    """The repository at the current commit of ``revision`` (branch, tag or commit; default: main).

    Raises HubMissing if the Hub does not have it, HubUnreachable if the Hub cannot be reached and the cache does not have it, and HubError
    if access is denied.
    """
    from huggingface_hub import DatasetInfo, HfApi, ModelInfo, get_hf_file_metadata, hf_hub_url, is_offline_mode

    if is_offline_mode():
        return _cached(kind, identifier, revision)
    api = HfApi()
    info = _asked(kind, identifier, revision, lambda: api.repo_info(identifier, repo_type=kind, revision=revision, timeout=TIMEOUT))
    commit = str(info.sha)
    if revision != commit:
        # A download by commit does not record which commit a revision names, but offline use needs it.
        write_in_cache(folder_of(kind, identifier) / "refs" / (revision or "main"), commit)
    assert isinstance(info, ModelInfo | DatasetInfo), f"{kind} {identifier}: {type(info).__name__}"
    files = tuple(sorted(sibling.rfilename for sibling in info.siblings or ()))
    if files and info.gated:
        # Metadata of a gated repository is public; only a file request shows whether access is allowed.
        url = hf_hub_url(identifier, files[0], repo_type=kind, revision=commit)
        _asked(kind, identifier, revision, lambda: get_hf_file_metadata(url, timeout=TIMEOUT))
    return Repository(kind, identifier, commit, files)


MOST_FILES = 5_000
"""Contents are not asked for if a repository has more files than this, because the Hub takes long to list them."""


def content_ids(kind: Kind, identifier: str, commit: str) -> dict[str, str | None]:
    """An id of the content of each file at a commit, by path; None for a file without one. Offline: of the downloaded files.

    Raises as ``look_up`` does, and HubError for a repository with more than MOST_FILES files.
    """
    from huggingface_hub import HfApi, is_offline_mode

    if is_offline_mode():
        snapshot = folder_of(kind, identifier) / "snapshots" / commit
        return {path.relative_to(snapshot).as_posix(): _blob_of(path) for path in snapshot.rglob("*") if path.is_file()}
    if len(look_up(kind, identifier, commit).files) > MOST_FILES:
        raise HubError(
            f"{NOUNS[kind]} {identifier!r} has more than {MOST_FILES:,} files; download what you need (hf download) and use that folder"
        )

    def ask() -> dict[str, str | None]:
        info = HfApi().repo_info(identifier, repo_type=kind, revision=commit, timeout=TIMEOUT, files_metadata=True)
        files = getattr(info, "siblings", None) or ()
        return {file.rfilename: file.lfs.sha256 if file.lfs is not None else file.blob_id for file in files}

    return _asked(kind, identifier, commit, ask)


def _blob_of(path: Path) -> str | None:
    """The id of a cached file's content: the name of the file that its link leads to; None if it is not a link."""
    return path.readlink().name if path.is_symlink() else None


def fetch(repository: Repository, name: str) -> Path:
    """The local path of the file ``name``, which is downloaded if necessary. Raises as ``look_up`` does."""
    from huggingface_hub import hf_hub_download

    kind, identifier, commit = repository.kind, repository.id, repository.commit
    path = folder_of(kind, identifier) / "snapshots" / commit / name
    if path.is_file():
        return path
    if repository.is_cached:
        raise HubUnreachable(f"{name} of the {NOUNS[kind]} {identifier!r} {_not_cached(kind, identifier)}")
    with _quiet() if name.endswith(SMALL) else nullcontext():
        return Path(_asked(kind, identifier, commit, lambda: hf_hub_download(identifier, name, repo_type=kind, revision=commit)))


@contextmanager
def _quiet() -> Iterator[None]:
    """Context without a progress bar, for small files."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _asked(kind: Kind, identifier: str, revision: str | None, ask: Callable[[], T]) -> T:
    """Return the result of ``ask``, after up to three attempts. Raises HubError, or a subclass, that says what to do."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    problem = ""
    for pause in (*PAUSES, None):
        try:
            return ask()
        except HFValidationError as error:
            raise HubMissing(f"{identifier!r} is not a Hub id; expected owner/name") from error
        except HfHubHTTPError as error:
            if (refused := _refusal(error, kind, identifier, revision)) is not None:
                raise refused from error
            problem = f"HTTP {error.response.status_code}"
        except (TransportError, OSError) as error:
            if isinstance(error, OSError) and error.errno in OF_THE_DISK:
                what = _named(kind, identifier)
                raise StorageError(f"{what} cannot be stored in the Hub cache ({error}); free disk space, or set HF_HOME") from error
            problem = f"{type(error).__name__}: {_first_line(error)}"
        if pause is not None:
            time.sleep(pause)
    raise HubUnreachable(
        f"the Hub at {_endpoint()} did not answer for {_named(kind, identifier)} ({problem}; {len(PAUSES) + 1} attempts). Check the "
        "connection and try again; with HF_HUB_OFFLINE=1 the local cache is used"
    )


def _named(kind: Kind, identifier: str) -> str:
    return f"the {NOUNS[kind]} {identifier!r}"


def _refusal(error: HfHubHTTPError, kind: Kind, identifier: str, revision: str | None) -> HubError | None:
    """What to do about an answer of the Hub; None if the Hub is busy, so another attempt may succeed."""
    from huggingface_hub.errors import DisabledRepoError, GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    what, page = _named(kind, identifier), _page(kind, identifier)
    if isinstance(error, GatedRepoError):  # a subclass of RepositoryNotFoundError
        return HubError(
            f"{what} is gated, and this account may not read it; accept its terms at {page}, then log in with `hf auth login` "
            "(or set HF_TOKEN)"
        )
    if isinstance(error, RevisionNotFoundError):
        return HubMissing(f"{what} has no revision {revision!r}; use a branch, a tag or a commit of {page}")
    if isinstance(error, DisabledRepoError):
        return HubError(f"{what} was disabled by the Hub; choose another one")
    if isinstance(error, RepositoryNotFoundError):
        login = "" if _has_token() else "; for a private one log in with `hf auth login` (or set HF_TOKEN)"
        return HubMissing(f"the Hub has no {NOUNS[kind]} {identifier!r} that this account can read; check the spelling{login}")
    status = error.response.status_code
    if status in (401, 403):
        return HubError(f"the Hub refuses {what} (HTTP {status}); check the token: `hf auth whoami`")
    if status not in BUSY:
        return HubError(f"the Hub did not give {what} (HTTP {status}: {_first_line(error)})")
    return None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _page(kind: Kind, identifier: str) -> str:
    return f"{_endpoint()}/{'datasets/' if kind == 'dataset' else ''}{identifier}"


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


# The local cache, in huggingface_hub's documented layout: refs/<revision> contains a commit, snapshots/<commit>/ the files


def folder_of(kind: Kind, identifier: str) -> Path:
    """The folder of a repository in the local cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / "--".join([f"{kind}s", *identifier.split("/")])


def write_in_cache(path: Path, text: str) -> None:
    """Write a file in the local cache, if that can be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{uuid.uuid4().hex}")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError:
        pass  # a read-only cache can still be used


def _cached(kind: Kind, identifier: str, revision: str | None) -> Repository:
    folder = folder_of(kind, identifier)
    commit = _cached_commit(folder, revision)
    snapshot = folder / "snapshots" / commit if commit is not None else None
    if commit is None or snapshot is None or not snapshot.is_dir():
        at = f" at revision {revision!r}" if revision is not None else ""
        raise HubUnreachable(f"the {NOUNS[kind]} {identifier!r}{at} {_not_cached(kind, identifier)}")
    files = sorted(path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file())
    return Repository(kind, identifier, commit, tuple(files), is_cached=True)


def _cached_commit(folder: Path, revision: str | None) -> str | None:
    """The cached commit of ``revision``. Without a record: for the main branch the only snapshot, if there is exactly one."""
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    try:
        return (folder / "refs" / (revision or "main")).read_text(encoding="utf-8").strip()
    except OSError:
        pass
    snapshots = [path.name for path in (folder / "snapshots").glob("*")]
    return snapshots[0] if revision in (None, "main") and len(snapshots) == 1 else None


def _not_cached(kind: Kind, identifier: str) -> str:
    kinds = " --repo-type dataset" if kind == "dataset" else ""
    return (
        "is not in the local cache, and HF_HUB_OFFLINE is set; unset it, or download it on a machine with a connection: "
        f"hf download {identifier}{kinds}"
    )
