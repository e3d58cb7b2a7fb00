"""Upload files to a model repository of the Hub: a missing repository is created, and all files are added in one commit.

An error becomes one HubError that says what to do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from httpx2 import TransportError

from stages.errors import HubError, HubMissing, HubUnreachable
from stages.hub.repositories import Repository, look_up

IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*")


def check_identifier(identifier: str) -> None:
    """Raise HubError unless ``identifier`` is ``owner/name``."""
    if IDENTIFIER.fullmatch(identifier) is None:
        raise HubError(f"{identifier!r} is not a repository id of the Hub; expected owner/name, for example my-name/my-model")


def check_may_upload() -> None:
    """Raise HubError if no token is set, HubUnreachable if HF_HUB_OFFLINE is set."""
    from huggingface_hub import get_token, is_offline_mode

    if is_offline_mode():
        raise HubUnreachable("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it and try again")
    if get_token() is None:
        raise HubError("no Hub token is set; log in with `hf auth login`, or set HF_TOKEN to a token that may write")


def look_up_own(identifier: str) -> Repository | None:
    """The model repository at its newest commit; None if this account can read no repository with this name."""
    try:
        return look_up("model", identifier)
    except HubMissing:
        return None


def create_repository(identifier: str, *, private: bool) -> None:
    """Create an empty model repository. Raises HubError if this account may not, or if it cannot read an existing one."""
    from huggingface_hub import HfApi

    refusals = {
        403: f"this account may not create repositories of {identifier.partition('/')[0]!r}; choose another owner, or ask for permission",
        409: f"the repository {identifier!r} exists, but this account may not read it; choose another name, or ask for access",
    }
    with _explained(f"creating {identifier!r}", refusals):
        HfApi().create_repo(identifier, repo_type="model", private=private)


def commit_files(
    identifier: str,
    files: Mapping[str, Path | bytes],
    delete: Sequence[str],
    *,
    message: str,
    parent: str | None,
    say: Callable[[str], None],
) -> str:
    """Add ``files`` (path in the repository -> file or content) and remove ``delete`` in one commit; returns the commit's address.

    ``parent``: the commit that must still be the newest. The upload becomes visible only with the commit.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    for path, content in sorted(files.items()):
        operations.append(CommitOperationAdd(path, content if isinstance(content, bytes) else str(content)))
    operations += [CommitOperationDelete(path) for path in sorted(delete)]
    refusals = {
        403: f"this account may not write to {identifier!r}; ask for permission, or push to another repository",
        404: f"the repository {identifier!r} was removed during the upload; push again",
        409: f"the repository {identifier!r} was changed by another user during the upload; push again",
        412: f"the repository {identifier!r} was changed by another user during the upload; push again",
    }
    with _explained(f"pushing to {identifier!r}", refusals):
        made = HfApi().create_commit(identifier, operations, commit_message=message, parent_commit=parent)
    say(f"pushed: {made.commit_url}")
    return str(made.oid)


@contextmanager
def _explained(doing: str, refusals: Mapping[int, str]) -> Iterator[None]:
    """Convert exceptions of the Hub's client to one message. ``refusals``: messages by HTTP status."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except HFValidationError as error:
        raise HubError(f"{doing}: {_line(error)}") from error
    except (HfHubHTTPError, TransportError, OSError, RuntimeError, ValueError) as error:
        refused = _first(error, HfHubHTTPError)
        if isinstance(refused, HfHubHTTPError):
            status = refused.response.status_code
            if status == 401:
                said = "the Hub does not accept the token; log in with `hf auth login`, or set HF_TOKEN to a token that may write"
            else:
                said = refusals.get(status, f"the Hub answered HTTP {status} ({_line(refused)}); try again later")
            raise HubError(f"{doing}: {said}") from error
        if _first(error, TransportError) is None and _first(error, OSError) is None:
            raise HubError(f"{doing}: {_line(error)}. The repository is unchanged") from error
        raise HubUnreachable(
            f"{doing}: the connection broke off ({type(error).__name__}: {_line(error)}). The commit comes last, so the repository is "
            "unchanged; push again"
        ) from error


def _first(error: BaseException | None, kind: type[BaseException]) -> BaseException | None:
    """The first error of a kind in the chain of causes."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0][:200]
