"""Access to a repository at the Hub: its files, and whether token and licence let this user have them, in words.

    look(source)   -> Remote: the commit, and every wanted file with its size and hash
    access(source) -> Access: one of STATES, a sentence, and the page on which to act

Two requests, the same that a download makes, so that `access` meets what a download would meet: the listing, which the
Hub gives to anybody, and the headers of one file, which it guards. huggingface_hub raises exceptions; `explain` turns
them into sentences and separates what they mix: a token that is missing, refused, or of too small a scope, and a
licence not accepted, under review, or refused.

The token is huggingface_hub's own (`hf auth login` or HF_TOKEN). It is never read here, only whether there is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath, PureWindowsPath

from huggingface_hub import HfApi, constants, get_hf_file_metadata, get_token, hf_hub_url
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ideogram_app.catalog.sources import Source
from ideogram_app.errors import AccessError, CheckpointError
from ideogram_app.text import gb

STATES = ("ready", "no_token", "not_accepted", "wrong_scope", "not_found", "offline", "unreachable")
TOKENS_PAGE = "https://huggingface.co/settings/tokens"
STATUS_PAGE = "https://status.huggingface.co"
SCOPE = "Read access to contents of all public gated repos you can access"  # as the tokens page words it
# What may be fetched: weights without code, and text. Pickles (.bin, .pt, .ckpt) and Python run when they are loaded.
HARMLESS = (".safetensors", ".gguf", ".json", ".txt", ".jinja", ".md")
LEGAL = ("LICENSE", "NOTICE")
# Base of all network errors: httpx.HTTPError, or httpx2's from huggingface_hub 2 on.
NETWORK_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
# OSError: the operating system's, and offline mode. ValueError: a listing that is no JSON but a hotel's login page.
CLIENT_ERRORS: tuple[type[Exception], ...] = (NETWORK_ERROR, OSError, ValueError)
TEMPORARY = (408, 425, 429, 500, 502, 503, 504)  # statuses worth a retry


@dataclass(frozen=True)
class Access:
    """Whether a source can be fetched now: one of `STATES`, what hinders and what to do, and the page to act on."""

    state: str
    sentence: str
    url: str = ""


@dataclass(frozen=True)
class RemoteFile:
    """A file at the Hub. Large files have their `sha256` there, small ones a git `blob` (SHA-1 with a header)."""

    path: str
    size: int
    sha256: str = ""
    blob: str = ""


@dataclass(frozen=True)
class Remote:
    """The wanted files of a repository at one commit; `left_out` matched the source's patterns but may run code."""

    commit: str
    files: tuple[RemoteFile, ...]
    left_out: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class _Case:
    """The words for one kind of refusal; `{}` fields are filled from the source."""

    state: str
    what: str
    do: str
    url: str = "{url}"


LATER = "Try again in some minutes; what has been fetched is kept"
CASES: dict[str, _Case] = {
    "no token": _Case(
        "no_token",
        "{repository} is only given to people who are logged in, and this computer has no Hugging Face token",
        "Make a token of the type Read at {tokens}, then run `hf auth login` and paste it, or set HF_TOKEN",
        TOKENS_PAGE,
    ),
    "bad token": _Case(
        "no_token",
        "Hugging Face does not accept the token of this computer: it was mistyped, has expired or was deleted",
        "Make a new one at {tokens}, then run `hf auth login` and paste it, or set HF_TOKEN",
        TOKENS_PAGE,
    ),
    "not accepted": _Case(
        "not_accepted",
        "Your account has not yet accepted the {licence} of {repository}",
        "Open {url}, log in with the account your token belongs to, read and accept it there, and try again",
    ),
    "under review": _Case(
        "not_accepted",
        "You have asked for {repository}, and its owners have not answered yet",
        "Wait for their answer; {url} shows it",
    ),
    "turned down": _Case(
        "not_accepted",
        "The owners of {repository} have turned down the request of your account",
        "See {url}, or choose weights from elsewhere",
    ),
    "scope": _Case(
        "wrong_scope",
        "Your token is not allowed to read gated repositories such as {repository}",
        f"Open {{tokens}}, edit the token, tick “{SCOPE}”, save, and try again",
        TOKENS_PAGE,
    ),
    "not found": _Case(
        "not_found",
        "Hugging Face has no {repository}, or does not show it to you: it was renamed, withdrawn or made private",
        "Look at {url} in a browser, or name a folder that already holds these weights",
    ),
    "no revision": _Case(
        "not_found",
        "{repository} no longer has the revision {revision} that this version of the program asks for",
        "Get a newer version of this program, or name a folder that already holds these weights",
    ),
    "offline": _Case(
        "offline",
        "{repository} is not complete on this computer, and the program works offline",
        "Allow the network (unset HF_HUB_OFFLINE), or name a folder that already holds these weights",
        "",
    ),
    "no network": _Case(
        "unreachable",
        "Hugging Face cannot be reached",
        f"Check the network, a proxy or a firewall. {LATER}",
        STATUS_PAGE,
    ),
    "busy": _Case("unreachable", "Hugging Face asks for patience: too many requests", LATER, STATUS_PAGE),
    "broken": _Case("unreachable", "Hugging Face answers with an error of its own", LATER, STATUS_PAGE),
}


@dataclass(frozen=True)
class _Rule:
    """The exceptions that are one case: by type, HTTP status, words of the message, and whether there is a token."""

    case: str
    kind: type[Exception] | tuple[type[Exception], ...]
    statuses: tuple[int, ...] = ()  # any
    words: str = ""
    with_token: bool = False  # else also without

    def applies(self, problem: Exception, has_token: bool) -> bool:
        return (
            isinstance(problem, self.kind)
            and (not self.statuses or _status(problem) in self.statuses)
            and self.words in str(problem).lower()
            and (has_token or not self.with_token)
        )


REFUSALS = (  # the first that applies counts
    _Rule("offline", OfflineModeIsEnabled),
    _Rule("scope", HfHubHTTPError, (403,), "fine-grained"),  # not raised as a gated repository: only its message says
    _Rule("bad token", GatedRepoError, (401,), with_token=True),
    _Rule("no token", GatedRepoError, (401,)),
    _Rule("under review", GatedRepoError, words="awaiting a review"),
    _Rule("turned down", GatedRepoError, words="rejected"),
    _Rule("not accepted", GatedRepoError),
    _Rule("no revision", RevisionNotFoundError),
    _Rule("not found", (RepositoryNotFoundError, DisabledRepoError)),
    _Rule("not found", HfHubHTTPError, (404, 410, 451)),
    _Rule("bad token", HfHubHTTPError, (401,), with_token=True),
    _Rule("no token", HfHubHTTPError, (401,)),
    _Rule("scope", HfHubHTTPError, (403,), with_token=True),
    _Rule("busy", HfHubHTTPError, (429,)),
    _Rule("broken", HfHubHTTPError),
    _Rule("no network", Exception),
)


def access(source: Source, *, offline: bool = False) -> Access:
    """Whether a source can be fetched now, and what to do where it cannot; never raises."""
    if not source.repository:
        return Access("ready", "These weights ship with the program.")
    try:
        remote = look(source, offline=offline)
    except CLIENT_ERRORS as problem:
        return explain(source, problem)
    except CheckpointError as problem:
        return Access("not_found", str(problem), source.url)
    return Access("ready", f"{source.repository} can be fetched: {gb(remote.size)}.", source.url)


def look(source: Source, *, offline: bool = False) -> Remote:
    """Ask the Hub for the listing, and for leave to fetch the largest file.

    Raises:
        CheckpointError: the repository holds no wanted file, or one without a hash.
        NETWORK_ERROR, OSError, ValueError: as huggingface_hub raises them, for `explain`.
    """
    if offline:
        raise OfflineModeIsEnabled("asked to work offline")
    timeout = constants.HF_HUB_ETAG_TIMEOUT
    info = HfApi().model_info(source.repository, revision=source.revision, files_metadata=True, timeout=timeout)
    siblings = info.siblings or ()
    matched = [each for each in siblings if any(fnmatchcase(each.rfilename, pattern) for pattern in source.patterns)]
    left_out = tuple(each.rfilename for each in matched if not is_harmless(each.rfilename))
    wanted = tuple(
        RemoteFile(each.rfilename, each.size or 0, each.lfs.sha256 if each.lfs else "", each.blob_id or "")
        for each in matched
        if is_harmless(each.rfilename)
    )
    if not wanted or not info.sha:
        raise CheckpointError(
            f"{source.repository} holds none of the files that this program fetches",
            expected=", ".join(source.patterns),
            got=f"{len(siblings)} other files",
        )
    unsure = [file.path for file in wanted if not (file.sha256 or file.blob)]
    if unsure:
        raise CheckpointError(f"Hugging Face names no hash of {unsure[0]} in {source.repository}", got=info.sha)
    largest = max(wanted, key=lambda file: file.size)
    get_hf_file_metadata(address(source, info.sha, largest.path), timeout=timeout)
    return Remote(info.sha, wanted, left_out)


def address(source: Source, commit: str, path: str) -> str:
    return hf_hub_url(source.repository, path, revision=commit)


def is_harmless(path: str) -> bool:
    """Whether a file cannot run code when it is loaded, and its path cannot leave the folder it is put into."""
    parts = path.replace("\\", "/").split("/")
    windows = PureWindowsPath(path)
    inside = path == "/".join(parts) and ".." not in parts and not (windows.drive or windows.root)
    name = PurePosixPath(path)
    return inside and (name.suffix.lower() in HARMLESS or (name.stem.upper() in LEGAL and not name.suffix))


def explain(source: Source, problem: Exception) -> Access:
    """What an exception of huggingface_hub means for the user; the words are ours, the status is the Hub's."""
    case = CASES[next(rule.case for rule in REFUSALS if rule.applies(problem, bool(get_token())))]
    row = {name: getattr(source, name) for name in ("repository", "revision", "licence", "url")}
    row["tokens"] = TOKENS_PAGE
    got = f"status {_status(problem)}" if case.state == "unreachable" and _status(problem) else ""
    error = AccessError(case.what.format(**row), got=got, do=case.do.format(**row))
    return Access(case.state, str(error), case.url.format(**row))


def retryable(problem: Exception) -> bool:
    """Whether the same request may succeed in a moment."""
    if isinstance(problem, HfHubHTTPError):
        return _status(problem) in TEMPORARY
    return isinstance(problem, NETWORK_ERROR)


def _status(problem: Exception) -> int:
    """The HTTP status of an answer, 0 where none came."""
    return problem.response.status_code if isinstance(problem, HfHubHTTPError) else 0
