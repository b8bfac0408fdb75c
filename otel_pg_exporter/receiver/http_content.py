"""How the body of an OTLP/HTTP request is written: its media type, its content encodings, and both undone."""

import enum
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message
from starlette.datastructures import Headers

from otel_pg_exporter.errors import TooLargeError, UndecodableError, UnsupportedError
from otel_pg_exporter.model import Hold

# Bytes inflated at once; what is inflated is reckoned with before there is more of it.
_PIECE = 2**20

# Characters of a header that are repeated; it may have 64 KiB, and would be logged.
_SHOWN = 100

_GZIP, _ZLIB, _RAW = 31, 15, -15  # zlib's `wbits`
_ZLIB_METHOD = 8  # in the low half of zlib's first byte; raw deflate can begin with it only in vain


class MediaType(enum.Enum):
    """How a message is written."""

    PROTOBUF = "application/x-protobuf"
    JSON = "application/json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What the headers say about a body."""

    media_type: MediaType
    encoding: str  # a key of _encodings
    length: int | None  # of the body as it travels; None when it comes in chunks


def answer_type(headers: Headers) -> MediaType:
    """Return how to write an answer to a request: as it is itself, or for people if that is unknown."""
    return _media_types.get(_bare(headers.get("content-type", "")), MediaType.JSON)


def content(headers: Headers, *, largest: int) -> Content:
    """Read a request's headers. Raises UnsupportedError, and TooLargeError for what is announced as such."""
    given = headers.get("content-type", "")
    media_type = _media_types.get(_bare(given))
    if media_type is None:
        known = " or ".join(each.value for each in MediaType)
        raise UnsupportedError(f"content type {given[:_SHOWN]!r} is not OTLP's: it must be {known}")
    encoding = _bare(headers.get("content-encoding", "")) or "identity"
    if encoding not in _encodings:
        raise UnsupportedError(f"content encoding {encoding[:_SHOWN]!r} is not read here, only {', '.join(_encodings)}")
    announced = headers.get("content-length")
    length = None if announced is None else int(announced)  # digits, as the parser has made sure
    if length is not None and length > largest:
        raise too_large(f"{length:,}", largest)
    return Content(media_type=media_type, encoding=encoding, length=length)


def write(media_type: MediaType, message: Message) -> bytes:
    """Write a message as a request was written."""
    if media_type is MediaType.PROTOBUF:
        return message.SerializeToString()
    return MessageToJson(message, indent=None).encode()


def too_large(size: str, largest: int) -> TooLargeError:
    """Return the error for a body beyond `max_request_bytes`."""
    return TooLargeError(f"the body has {size} bytes, at most {largest:,} are taken (--max-request-bytes)")


def decode(encoding: str, body: bytes, hold: Hold, *, largest: int) -> bytes:
    """Undo a content encoding; `hold` is told how large the body gets.

    Raises UndecodableError, TooLargeError, and what `hold` does.
    """
    return _encodings[encoding](body, hold, largest)


def _identity(body: bytes, _hold: Hold, _largest: int) -> bytes:
    return body


def _gunzip(body: bytes, hold: Hold, largest: int) -> bytes:
    return _inflate(body, hold, largest, _GZIP)


def _inflate_either(body: bytes, hold: Hold, largest: int) -> bytes:
    """Undo `deflate`, which is zlib's format (RFC 9110) and, from some senders, the bare stream."""
    return _inflate(body, hold, largest, _ZLIB if _is_zlib(body) else _RAW)


def _is_zlib(body: bytes) -> bool:
    """Say whether a body begins as RFC 1950 demands: a raw stream that does so too is one that holds nothing usable."""
    return len(body) > 1 and body[0] & 0x0F == _ZLIB_METHOD and int.from_bytes(body[:2], "big") % 31 == 0


def _inflate(body: bytes, hold: Hold, largest: int, wbits: int) -> bytes:
    inflater = zlib.decompressobj(wbits)
    pieces: list[bytes] = []
    size = 0
    try:
        for piece in _inflated(body, inflater):
            size += len(piece)
            if size > largest:
                raise too_large(f"more than {largest:,} decompressed", largest)
            hold(len(body) + 2 * size)  # in pieces and, at the end, as a whole
            pieces.append(piece)
    except zlib.error as exc:
        raise UndecodableError(f"{len(body):,} bytes cannot be decompressed: {exc}") from exc
    if not inflater.eof:
        raise UndecodableError(f"{len(body):,} compressed bytes break off after {size:,} decompressed ones")
    return b"".join(pieces)


def _inflated(body: bytes, inflater: "zlib._Decompress") -> Iterator[bytes]:
    """Yield what a compressed stream holds, in small pieces; what follows its end (in gzip, another) is refused."""
    for start in range(0, len(body), _PIECE):
        rest = body[start : start + _PIECE]
        while rest:
            if inflater.eof:
                raise UndecodableError(f"{len(body):,} bytes hold more than one compressed stream")
            yield inflater.decompress(rest, _PIECE)
            rest = inflater.unconsumed_tail or inflater.unused_data
    while not inflater.eof and (piece := inflater.decompress(b"", _PIECE)):
        yield piece


def _bare(value: str) -> str:
    """Return a header's value without parameters."""
    return value.partition(";")[0].strip().lower()


_media_types = MappingProxyType({each.value: each for each in MediaType})
_encodings: Mapping[str, Callable[[bytes, Hold, int], bytes]] = MappingProxyType(
    {"identity": _identity, "gzip": _gunzip, "x-gzip": _gunzip, "deflate": _inflate_either}
)
