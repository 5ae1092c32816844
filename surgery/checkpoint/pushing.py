"""Sending a checkpoint to the hub: refused before any work, one commit or none, and compared with what the hub has."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import OutputError, SourceError, SurgeryError, brief
from .hub import HubId, hub_id
from .hub_client import bars_on_terminals, foreign_errors, refusal
from .manifest import MANIFEST, Manifest

MAIN = "main"
_NO_BRANCH = re.compile(r"[0-9a-f]{40}|refs/.*")
# What may be in a repository before; a commit leaves the first as it is.
ATTRIBUTES, ABOUT = ".gitattributes", re.compile(r"\.gitattributes|README\.md|LICEN[SC]E.*", re.IGNORECASE)


@dataclass(frozen=True)
class Destination:
    """Where to push: the branch `id.revision` of `id.repo`. `private`: None where there is no such repository yet.
    `head`: its newest commit, None where there is no such branch yet."""

    id: HubId
    private: bool | None
    head: str | None


def require_push(to: str) -> Destination:
    """Where "owner/name" or "owner/name@branch" is, once the hub says that this token may write there.

    Raises SourceError for a name that cannot be pushed to, and OutputError without permission, or where the branch
    holds anything but an earlier output of a run.
    """
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub

    at = hub_id(to)
    if at is None:
        raise SourceError(f"{to} is no name on the hub; give one of the form owner/name, or owner/name@branch.")
    at = HubId(at.repo, at.revision or MAIN)
    if _NO_BRANCH.fullmatch(str(at.revision)):
        raise SourceError(
            f"{to}: {at.revision} is no branch, and only branches can be pushed to; give owner/name@branch."
        )
    api = HfApi()
    with push_errors(f"cannot push to {to}"):
        account = api.whoami()
        _require_role(at, account)
        try:
            private = bool(api.repo_info(at.repo).private)
        except hub.RepositoryNotFoundError:
            _require_owner(at, account)
            return Destination(at, None, None)
        api.auth_check(at.repo, write=True)
        try:
            head = api.repo_info(at.repo, revision=at.revision).sha
        except hub.RevisionNotFoundError:
            return Destination(at, private, None)
        held = api.list_repo_files(at.repo, revision=head)
    others = [name for name in held if not ABOUT.fullmatch(name)]
    if others and MANIFEST not in others:
        raise OutputError(
            f"{at} holds {others[0]}, and no output of a run, which alone is replaced; give another name, or a new "
            "branch."
        )
    return Destination(at, private, head)


def push_files(root: Path, manifest: Manifest, to: Destination, message: str, description: str) -> str:
    """Make the branch hold what the directory `root` holds, by one commit; its hash.

    A repository that is not there yet is created, private. Hidden files stay here. Raises OutputError; the branch is
    then as it was.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi

    api, repo, branch = HfApi(), to.id.repo, to.id.revision
    files = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}
    files = {name: path for name, path in files.items() if not name.startswith(".")}
    failing = f"{root} is complete, but was not pushed to {to.id}"
    with bars_on_terminals(), push_errors(failing, f"; then: surgery push {shlex.quote(str(root))} {to.id}"):
        if to.private is None:
            api.create_repo(repo, private=True, exist_ok=True)
        if to.head is None and branch != MAIN:
            api.create_branch(repo, branch=str(branch))
        before = set(api.list_repo_files(repo, revision=branch)) - {ATTRIBUTES}
        operations: list[CommitOperationAdd | CommitOperationDelete | CommitOperationCopy] = [
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()),
            *(CommitOperationDelete(path_in_repo=name) for name in sorted(before - set(files))),
        ]
        commit = api.create_commit(
            repo, operations, commit_message=message, commit_description=description, revision=branch,
            parent_commit=to.head,
        ).oid  # fmt: skip
        _require_same(api, repo, commit, {name: path.stat().st_size for name, path in files.items()}, manifest)
    return str(commit)


def _require_role(at: HubId, account: Mapping[str, Any]) -> None:
    role = ((account.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise OutputError(
            f"cannot push to {at.repo}: the token may only read; make one at the hub that may write, then: hf auth "
            "login."
        )


def _require_owner(at: HubId, account: Mapping[str, Any]) -> None:
    """A new repository can be made under one's own name, and those of organisations where one may write."""
    orgs = [org["name"] for org in account.get("orgs") or [] if org.get("roleInOrg") != "read"]
    mine = [account["name"], *orgs]
    if at.repo.partition("/")[0].lower() not in [name.lower() for name in mine]:
        raise OutputError(
            f"cannot push to {at.repo}: it does not exist, and you ({account['name']}) may create models only under "
            f"{', '.join(mine[:5])}; give such a name."
        )


def _require_same(api: Any, repo: str, commit: str, sizes: Mapping[str, int], manifest: Manifest) -> None:
    """OutputError unless the hub holds every file: a .gitignore there, or another push, may keep some out."""
    there = {entry.path: entry for entry in api.list_repo_tree(repo, revision=commit, recursive=True)}
    for name, size in sizes.items():
        lfs = getattr(there.get(name), "lfs", None)
        recorded = manifest.files.get(name)
        same = name in there and there[name].size == size
        if not same or (lfs is not None and recorded is not None and lfs.sha256 != recorded.sha256):
            raise OutputError(f"{repo} does not hold {name} as it is here, at {commit}; look for a .gitignore there.")


@contextlib.contextmanager
def push_errors(what: str, way_out: str = "") -> Iterator[None]:
    """Turn whatever the client raises into one sentence of OutputError: what was not possible, why, the way out."""
    from huggingface_hub import errors as hub

    try:
        yield
    except SurgeryError:
        raise
    except foreign_errors() as error:
        # An upload that fails is wrapped in a RuntimeError that does not say why.
        cause = error.__cause__ if type(error) is RuntimeError and isinstance(error.__cause__, Exception) else error
        if isinstance(cause, hub.LocalTokenNotFoundError):
            said = f"{what}: there is no token; log in with one that may write: hf auth login"
        elif isinstance(cause, hub.OfflineModeIsEnabled):
            said = f"{what}: HF_HUB_OFFLINE forbids to ask the hub; unset it"
        elif isinstance(cause, hub.HFValidationError):
            said = f"{what}: the hub does not allow that name; give another"
        elif isinstance(cause, hub.HfHubHTTPError):
            said = refusal(what, cause).rstrip(".")
        else:
            said = f"{what} ({brief(cause)}){'' if way_out else '; try again'}"
        raise OutputError(f"{said}{way_out}.") from error
