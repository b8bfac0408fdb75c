"""OTLP/JSON to OTLP/protobuf, from where on both are one.

The frame (resources, scopes, items) is walked in the text, as `framing` does in bytes, and each part is parsed alone:
so one that is wrong, too deep or too costly is refused alone, and at no time is there more than one part as objects,
which take up to thirty times as much memory as the text. What cannot be converted travels on as a note (see
`protobuf_wire.note`), which the decoder refuses with the reason that it holds, and keeps.
"""

import contextlib
import json
import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from otel_pg_exporter.errors import TooLargeError, UndecodableError
from otel_pg_exporter.model import Hold
from otel_pg_exporter.transcode.json_fields import ConversionError, writer
from otel_pg_exporter.transcode.limits import DECODING, Limits
from otel_pg_exporter.transcode.protobuf_wire import delimited, note

_LIMITS = Limits()

# Strings, brackets and commas of one part: an attribute has some ten, and four fields. At most 100 bytes each, parsed.
_TOKENS = 4 * _LIMITS.fields
# Of a request, beyond what parts can have: each costs a step. 64 MiB of the shortest attributes have fewer.
_BRACKETS = 8_000_000
_DEEPEST = 500  # brackets; the deepest that protobuf takes has 400, and the parser fails near 1,000

_SPACE = re.compile(rb"[ \t\r\n]*+")
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_WORD = re.compile(rb"[^\s,:\[\]{}\"]++")
_TO_BRACKET = re.compile(rb'[^"\[\]{}]*+(?:%b[^"\[\]{}]*+)*+[\[\]{}]' % _STRING.pattern, re.DOTALL)
_TOKEN = re.compile(rb"%b|[\[\]{},]" % _STRING.pattern, re.DOTALL)
_SEPARATORS = (b'"', b"[", b"]", b"{", b"}", b",")  # at most as many tokens; more of these where they are in strings

# Of a message that holds others: the number of the field that they are in, and of the one that it has itself.
_RESOURCES, _CHILDREN, _OWN = 1, 2, 1
_ITEM_LEVEL = 3
_REQUEST_KEYS = frozenset({"resourceSpans", "resourceLogs", "resourceMetrics"})


def to_protobuf(request: type[Message], body: bytes, hold: Hold, *, parts: int = _LIMITS.parts) -> bytes:
    """Convert an `Export…ServiceRequest`; the same text always gives the same bytes.

    Raises UndecodableError when not even its frame can be read, TooLargeError when it has more than so many items,
    scopes, resources, and fields of the latter, and what `hold` does.
    """
    hold(3 * len(body))  # as text, as protobuf in pieces, and these as a whole
    resources: Any = request.DESCRIPTOR.fields_by_number[_RESOURCES]  # the stubs don't agree which class it has
    return _Text(body, parts).request(resources)


class _Value(NamedTuple):
    """The text of a value, and how deep its brackets nest."""

    text: bytes
    depth: int


class _Text:
    """A text, and how far it was read: in UTF-8, since one wide character makes all of CPython's text as wide."""

    def __init__(self, text: bytes, parts: int) -> None:
        self._text = text
        self._position = 0
        self._parts_limit = self._parts_left = parts
        self._brackets_left = _BRACKETS

    def request(self, resources: FieldDescriptor) -> bytes:
        """Read a whole request."""
        pieces: list[bytes] = []
        found = set()
        for key in self._members():
            found.add(key)
            if key in {resources.name, resources.json_name}:
                pieces += (delimited(_RESOURCES, self._group(resources, 1)) for _ in self._elements())
            else:
                self._skip()
        if not self._at_end():
            raise self._broken("nothing more")
        if not pieces and (others := found & _REQUEST_KEYS - {resources.json_name}):
            raise UndecodableError(f"the body holds {', '.join(sorted(others))}, not {resources.json_name}")
        return b"".join(pieces)

    def _group(self, field: FieldDescriptor, level: int) -> bytes:
        """Read the resource, or the scope, that stands here, with all that it holds."""
        self._count()
        descriptor = _message_type(field)
        children = descriptor.fields_by_number[_CHILDREN]
        pieces: list[bytes] = []
        rest: dict[str, _Value] = {}
        for key in self._members():
            if key not in {children.name, children.json_name}:
                rest[key] = self._skip()
            elif level + 1 == _ITEM_LEVEL:
                pieces += (self._item(_message_type(children)) for _ in self._elements())
            else:
                pieces += (delimited(_CHILDREN, self._group(children, level + 1)) for _ in self._elements())
        own = _object(rest)
        try:
            content = _convert(descriptor, own, level)
        except ValueError as exc:
            content = delimited(_OWN, note(f"OTLP/JSON: {exc}", own.text))
        return content + b"".join(pieces)

    def _item(self, descriptor: Descriptor) -> bytes:
        self._count()
        value = self._skip()
        try:
            content = _convert(descriptor, value, _ITEM_LEVEL)
        except ValueError as exc:
            content = note(f"OTLP/JSON: {exc}", value.text)
        return delimited(_CHILDREN, content)

    def _count(self) -> None:
        self._parts_left -= 1
        if self._parts_left < 0:
            raise TooLargeError(
                f"the request has more than {self._parts_limit:,} items, scopes, resources and fields of these; "
                "send smaller requests"
            )

    # JSON's grammar, as far as the frame goes. Whoever is led to a value reads it, one way or the other.

    def _members(self) -> Iterator[str]:
        """Stand before the value of each member of the object that begins here, or of none if it is null."""
        for _ in self._entries(b"{", b"}"):
            self._space()
            match = _STRING.match(self._text, self._position)
            if match is None:
                raise self._broken("a string")
            self._position = match.end()
            try:
                key: str = json.loads(_decoded(match[0]))
            except ValueError:
                raise self._broken("a string before this") from None
            self._expect(b":")
            self._count()
            yield key

    def _elements(self) -> Iterator[None]:
        """Stand before each element of the array that begins here, or of none if it is null."""
        return self._entries(b"[", b"]")

    def _entries(self, opening: bytes, closing: bytes) -> Iterator[None]:
        if self._take(b"null"):
            return
        self._expect(opening)
        if self._take(closing):
            return
        while True:
            yield
            if self._take(closing):
                return
            self._expect(b",")

    def _skip(self) -> _Value:
        """Return the value that stands here, whatever it is."""
        self._space()
        start = self._position
        if self._text.startswith((b"{", b"["), start):
            return self._bracketed(start)
        match = _STRING.match(self._text, start) or _WORD.match(self._text, start)
        if match is None:
            raise self._broken("a value")
        self._position = match.end()
        return _Value(match[0], 0)

    def _bracketed(self, start: int) -> _Value:
        text, position = self._text, start
        depth = deepest = brackets = 0
        while depth or not brackets:
            if brackets > self._brackets_left:
                raise TooLargeError(f"the request has more than {_BRACKETS:,} brackets; send smaller requests")
            match = _TO_BRACKET.match(text, position)
            if match is None:
                raise self._broken("a value that ends")
            position = match.end()
            brackets += 1
            depth += 1 if text[position - 1] in b"{[" else -1
            deepest = max(deepest, depth)
        self._brackets_left -= brackets
        self._position = position
        return _Value(text[start:position], deepest)

    def _take(self, word: bytes) -> bool:
        self._space()
        if not self._text.startswith(word, self._position):
            return False
        self._position += len(word)
        return True

    def _expect(self, word: bytes) -> None:
        if not self._take(word):
            raise self._broken(word.decode())

    def _at_end(self) -> bool:
        self._space()
        return self._position == len(self._text)

    def _space(self) -> None:
        match = _SPACE.match(self._text, self._position)
        assert match is not None
        self._position = match.end()

    def _broken(self, expected: str) -> UndecodableError:
        return UndecodableError(
            f"the body of {len(self._text):,} bytes is not OTLP/JSON: {expected} is expected at byte {self._position:,}"
        )


def _message_type(field: FieldDescriptor) -> Descriptor:
    assert field.message_type is not None
    return field.message_type


def _object(members: dict[str, _Value]) -> _Value:
    text = b",".join([b"%b:%b" % (json.dumps(key).encode(), value.text) for key, value in members.items()])
    return _Value(b"{%b}" % text, max((value.depth for value in members.values()), default=0))


def _convert(descriptor: Descriptor, value: _Value, level: int) -> bytes:
    """Convert one part; raises ValueError."""
    text = value.text
    if value.depth > _DEEPEST:
        raise ConversionError(f"brackets nest deeper than {_DEEPEST} levels")
    if sum(map(text.count, _SEPARATORS)) > _TOKENS and sum(1 for _ in _TOKEN.finditer(text)) > _TOKENS:
        raise ConversionError(f"more than {_TOKENS:,} values, names and commas")
    with DECODING if len(text) > _LIMITS.piece_bytes else contextlib.nullcontext():
        decoded = _decoded(text)
        if (size := sys.getsizeof(decoded)) > _LIMITS.text_bytes:
            raise ConversionError(f"its text takes {size:,} bytes; at most {_LIMITS.text_bytes:,} are allowed")
        parsed = json.loads(decoded)
        return writer(descriptor).write({} if parsed is None else parsed, level)


def _decoded(text: bytes) -> str:
    # Bytes that are no UTF-8 are carried on, so that they are repaired where protobuf's are.
    return text.decode(errors="surrogateescape")
