"""What a repository holds at the Hub, and whether this user may have it, in words.

    look(source)   -> Remote: the commit, and every wanted file with its size and hash
    access(source) -> Access: one of STATES, a sentence, and the page on which to act

Two requests, the same that a download makes: the listing, which the Hub gives to anybody, and the headers of one file,
where the gate stands. What `access` says is therefore what a download would meet. huggingface_hub knows the Hub's
answers as exceptions; `explain` turns those into sentences and tells apart what they leave together: a token that is
missing, refused, or of too small a scope, and a licence not accepted, under review, or refused.

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
# Base of everything that goes wrong on the line: httpx.HTTPError, or httpx2's from huggingface_hub 2 on.
LINE_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
# OSError: the operating system's, and offline mode. ValueError: a listing that is no JSON but a hotel's login page.
CLIENT_ERRORS: tuple[type[Exception], ...] = (LINE_ERROR, OSError, ValueError)
PASSING = (408, 425, 429, 500, 502, 503, 504)  # statuses that may be gone at the next attempt


@dataclass(frozen=True)
class Access:
    """Whether a source can be fetched now.

    Attributes:
        state: one of `STATES`.
        sentence: what stands in the way and what to do; whole sentences.
        url: the page on which to act, "" where there is none.
    """

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
    """What is wanted of a repository at one commit; `left_out` matched the source's patterns but may run code."""

    commit: str
    files: tuple[RemoteFile, ...]
    left_out: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class _Case:
    """What to say of one way to be turned away; `{}` fields are filled from the source."""

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
    "no line": _Case(
        "unreachable",
        "Hugging Face cannot be reached",
        f"Check the network, a proxy or a firewall. {LATER}",
        STATUS_PAGE,
    ),
    "busy": _Case("unreachable", "Hugging Face asks for patience: too many requests", LATER, STATUS_PAGE),
    "broken": _Case("unreachable", "Hugging Face answers with an error of its own", LATER, STATUS_PAGE),
}


def access(source: Source, *, offline: bool = False, token: str | None = None) -> Access:
    """Whether a source can be fetched now, and what to do where it cannot; never raises."""
    if not source.repository:
        return Access("ready", "These weights ship with the program.")
    try:
        remote = look(source, offline=offline, token=token)
    except CLIENT_ERRORS as problem:
        return explain(source, problem, token=token)
    except CheckpointError as problem:
        return Access("not_found", str(problem), source.url)
    return Access("ready", f"{source.repository} can be fetched: {gb(remote.size)}.", source.url)


def look(source: Source, *, offline: bool = False, token: str | None = None) -> Remote:
    """Ask the Hub what it has and whether it gives it.

    Raises:
        CheckpointError: the repository holds nothing that is wanted, or a file without size or hash.
        LINE_ERROR, OSError, ValueError: as huggingface_hub raises them, for `explain`.
    """
    if offline:
        raise OfflineModeIsEnabled("asked to work offline")
    timeout = constants.HF_HUB_ETAG_TIMEOUT
    info = HfApi().model_info(
        source.repository, revision=source.revision, files_metadata=True, timeout=timeout, token=token
    )
    wanted, left_out = [], []
    for sibling in info.siblings or ():
        if any(fnmatchcase(sibling.rfilename, pattern) for pattern in source.patterns):
            if not is_harmless(sibling.rfilename):
                left_out.append(sibling.rfilename)
                continue
            hashed = sibling.lfs.sha256 if sibling.lfs else ""
            wanted.append(RemoteFile(sibling.rfilename, sibling.size or 0, hashed, sibling.blob_id or ""))
    if not wanted or not info.sha:
        raise CheckpointError(
            f"{source.repository} holds none of the files that this program fetches",
            expected=", ".join(source.patterns),
            got=f"{len(info.siblings or ())} other files",
        )
    unsure = [file.path for file in wanted if not (file.sha256 or file.blob)]
    if unsure:
        raise CheckpointError(f"Hugging Face names no hash of {unsure[0]} in {source.repository}", got=info.sha)
    largest = max(wanted, key=lambda file: file.size)
    get_hf_file_metadata(address(source, info.sha, largest.path), token=token, timeout=timeout)
    return Remote(info.sha, tuple(wanted), tuple(left_out))


def address(source: Source, commit: str, path: str) -> str:
    """Where a file is fetched from."""
    return hf_hub_url(source.repository, path, revision=commit)


def is_harmless(path: str) -> bool:
    """Whether a file cannot run code when it is loaded, and its path cannot leave the folder it is put into."""
    parts = path.replace("\\", "/").split("/")
    windows = PureWindowsPath(path)
    inside = path == "/".join(parts) and ".." not in parts and not (windows.drive or windows.root)
    name = PurePosixPath(path)
    return inside and (name.suffix.lower() in HARMLESS or (name.stem.upper() in LEGAL and not name.suffix))


def explain(source: Source, problem: Exception, *, token: str | None = None) -> Access:
    """What an exception of huggingface_hub means for the user; the words are ours, the status is the Hub's."""
    case = CASES[_case(problem, has_token=bool(token or get_token()))]
    row = {
        "repository": source.repository,
        "revision": source.revision,
        "licence": source.licence,
        "url": source.url,
        "tokens": TOKENS_PAGE,
    }
    got = f"status {_status(problem)}" if case.state == "unreachable" and _status(problem) else ""
    told = AccessError(case.what.format(**row), got=got, do=case.do.format(**row))
    return Access(case.state, str(told), case.url.format(**row))


def is_passing(problem: Exception) -> bool:
    """Whether the same request may succeed in a moment."""
    if isinstance(problem, HfHubHTTPError):
        return _status(problem) in PASSING
    return isinstance(problem, LINE_ERROR)


def _status(problem: Exception) -> int:
    """The HTTP status of an answer, 0 where none came."""
    return problem.response.status_code if isinstance(problem, HfHubHTTPError) else 0


def _case(problem: Exception, has_token: bool) -> str:
    """The row of `CASES` that an exception belongs to."""
    if isinstance(problem, OfflineModeIsEnabled):
        return "offline"
    if not isinstance(problem, HfHubHTTPError):
        return "no line"
    status, words = _status(problem), str(problem).lower()
    if status == 403 and "fine-grained" in words:  # only its message tells; it is not marked as gated
        return "scope"
    if isinstance(problem, GatedRepoError):
        if status == 401:
            return "bad token" if has_token else "no token"
        waits, refused = "awaiting a review" in words, "rejected" in words
        return "under review" if waits else "turned down" if refused else "not accepted"
    if isinstance(problem, RevisionNotFoundError):
        return "no revision"
    if isinstance(problem, RepositoryNotFoundError | DisabledRepoError) or status in (404, 410, 451):
        return "not found"
    if status == 401:
        return "bad token" if has_token else "no token"
    if status == 403 and has_token:
        return "scope"
    return "busy" if status == 429 else "broken"
