"""Who may send: bearer tokens and basic credentials from files, the same for both front doors.

An entry may be written plainly or as `sha256:` and the secret's digest in hex. A fast digest is enough, and on purpose:
what programs send is made by a generator and cannot be guessed, hashed however fast, while a slow hash in front of the
door would let anybody keep the processor busy by wrong guesses. Digests of equal length are all that is compared, each
with every entry, so that the time of an answer tells nothing.
"""

import base64
import binascii
import hashlib
import hmac
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from otel_pg_exporter.config import SecuritySettings
from otel_pg_exporter.errors import ConfigurationError, UnauthenticatedError
from otel_pg_exporter.pipeline.ticker import Job
from otel_pg_exporter.receiver.files import LOOK_INTERVAL, FollowedFiles, exposed

_logger = logging.getLogger(__name__)

_HASHED = re.compile(r"sha256:([0-9a-fA-F]{64})")
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # RFC 6750: what can follow `Bearer`
_SHORT = 16  # characters, below which a secret may be guessed


class Authenticator:
    """Checks the credentials that requests bring against files, which are followed while the process runs."""

    def __init__(self, settings: SecuritySettings) -> None:
        """Read the files; raises ConfigurationError, which names file and line but no secret."""
        files = {
            "Bearer": ("--auth-bearer-file", settings.auth_bearer_file, _token_entry, _sha256),
            "Basic": ("--auth-basic-file", settings.auth_basic_file, _basic_entry, _basic_digest),
        }
        self._schemes = {
            name.lower(): _Scheme(name=name, setting=setting, path=path, entry=entry, digest=digest)
            for name, (setting, path, entry, digest) in files.items()
            if path is not None
        }
        self._taken = " or ".join(scheme.name for scheme in self._schemes.values())

    @property
    def jobs(self) -> list[Job]:
        """What is to be run beside: it looks at the files."""
        return [
            Job(name=f"{scheme.name} credentials", interval=LOOK_INTERVAL, run=scheme.look)
            for scheme in self._schemes.values()
        ]

    def warnings(self) -> Iterator[str]:
        """Yield what is amiss with the files as they are; it was logged when they were read."""
        for scheme in self._schemes.values():
            yield from scheme.warnings()

    @property
    def challenge(self) -> str:
        """The value of HTTP's `WWW-Authenticate`."""
        return ", ".join(f'{scheme.name} realm="OTLP"' for scheme in self._schemes.values())

    def check(self, authorization: Sequence[str]) -> None:
        """Raise UnauthenticatedError, without a word of what was sent, unless a request may be taken.

        `authorization` are the values of its header (or its metadata) of that name, of which one is wanted.
        """
        if not authorization:
            raise UnauthenticatedError(f"no credentials; the header `authorization` must bring {self._taken} ones")
        if len(authorization) > 1:
            raise UnauthenticatedError(f"{len(authorization)} headers `authorization` where one is wanted")
        name, _, credentials = authorization[0].strip().partition(" ")
        scheme = self._schemes.get(name.lower())
        if scheme is None:  # the name is not repeated: it is the token itself where somebody forgot `Bearer`
            raise UnauthenticatedError(f"the header `authorization` must begin with {self._taken}")
        if not scheme.admits(credentials.strip()):
            raise UnauthenticatedError(f"wrong {scheme.name} credentials")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    digest: bytes
    guessable: bool  # as far as one can see


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entries:
    """A file's contents."""

    digests: tuple[bytes, ...]
    guessable: tuple[str, ...]  # numbers of lines


class _Scheme:
    """One way to authenticate, with its file."""

    def __init__(
        self,
        *,
        name: str,
        setting: str,
        path: Path,
        entry: Callable[[str], _Entry],
        digest: Callable[[bytes], bytes],
    ) -> None:
        self.name = name
        self._setting = setting
        self._path = path
        self._entry = entry
        self._digest = digest
        self._entries = FollowedFiles({setting: path}, self._load)
        self._log_warnings()

    def admits(self, credentials: str) -> bool:
        """Tell whether the file holds these credentials."""
        sent = self._digest(credentials.encode("utf-8", "replace"))
        found = False
        for entry in self._entries.value.digests:  # all of them: to stop at the first that fits would tell which one
            found |= hmac.compare_digest(entry, sent)
        return found

    def look(self) -> None:
        """Take over what has changed; raises ConfigurationError, and leaves all as it was, for what is wrong."""
        if self._entries.look():
            number = len(self._entries.value.digests)
            _logger.info("%s: %d entries taken over from %s", self._setting, number, self._path)
            self._log_warnings()

    def warnings(self) -> Iterator[str]:
        """Yield what is amiss with the file."""
        if guessable := self._entries.value.guessable:
            yield (
                f"{self._setting}: {self._path}, line {', '.join(guessable)}: less than {_SHORT} characters can be "
                "guessed; `openssl rand -hex 32` makes better ones"
            )
        yield from exposed(self._setting, self._path)

    def _log_warnings(self) -> None:
        for text in self.warnings():
            _logger.warning("%s", text)

    def _load(self, contents: Mapping[str, bytes]) -> _Entries:
        where = f"{self._setting}: {self._path}"
        try:
            lines = contents[self._setting].decode("utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise ConfigurationError(f"{where} is no text in UTF-8") from None
        digests, guessable = [], []
        for number, line in enumerate(map(str.strip, lines), start=1):
            if not line or line.startswith("#"):
                continue
            try:
                entry = self._entry(line)
            except ValueError as exc:
                raise ConfigurationError(f"{where}, line {number}: {exc}") from None
            digests.append(entry.digest)
            guessable += [str(number)] * entry.guessable
        if not digests:
            raise ConfigurationError(f"{where} holds no entry, so nobody could send")
        return _Entries(digests=tuple(digests), guessable=tuple(guessable))


def _sha256(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()


def _token_entry(line: str) -> _Entry:
    if line.startswith("sha256:"):
        return _secret_entry(line)
    if _TOKEN.fullmatch(line) is None:
        raise ValueError("no bearer token: only letters, digits and -._~+/ can be sent, with = at the end")
    return _secret_entry(line)


def _basic_entry(line: str) -> _Entry:
    user, colon, password = line.partition(":")
    if not (user and colon and password):
        raise ValueError("not of the form user:password or user:sha256:…")
    secret = _secret_entry(password)
    return _Entry(digest=_sha256(user.encode()) + secret.digest, guessable=secret.guessable)


def _secret_entry(secret: str) -> _Entry:
    if not secret.startswith("sha256:"):
        return _Entry(digest=_sha256(secret.encode()), guessable=len(secret) < _SHORT)
    match = _HASHED.fullmatch(secret)
    if match is None:
        raise ValueError("after sha256: there must be 64 hexadecimal digits")
    digest = bytes.fromhex(match[1])
    if digest in {_sha256(b""), _sha256(b"\n")}:
        raise ValueError("this is the digest of nothing: was the variable empty that it was made of?")
    return _Entry(digest=digest, guessable=False)


def _basic_digest(credentials: bytes) -> bytes:
    try:
        user, _, password = base64.b64decode(credentials, validate=True).partition(b":")
    except binascii.Error:
        return b""  # fits no entry
    return _sha256(user) + _sha256(password)
