"""What the SDK's values weigh before they are encoded, and how those that are too heavy are cut for `dead_letters`.

The limits are those of decoding an item, so that one which is stored directly is stored by way of the spool, too.
(Resources and scopes have limits on that way alone.)
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from otel_pg_exporter.transcode.limits import Limits
from otel_pg_exporter.transcode.values import MAX_LEVEL, SCALARS

LIGHT = 16_384
"""Characters and values: an item with no more keeps to all limits, however they are encoded."""

_PAIR_FIELDS, _ELEMENT_FIELDS = 4, 2  # of protobuf: an attribute is itself, key, value and the value's own
_MOST_GROWTH = 24  # a control character takes six of JSON, and four bytes each beside one wide character
_ESCAPED = [chr(code) for code in range(32)]
_DOUBLED = '"\\'

_KEPT_TEXT = 1_000  # characters or bytes of each value
_KEPT_VALUES = 1_000


def rough_size(attributes: Mapping[str, Any], level: int) -> int:
    """Return how many characters and values attributes have, or just more than LIGHT when that takes a closer look.

    It does where they may nest too deep (`level` is that of their values), and where uncommon types are among them.
    """
    if len(attributes) > LIGHT:
        return LIGHT + 1
    try:
        size = len(attributes) + len("".join(attributes))
    except TypeError:  # keys of other types
        return LIGHT + 1
    return _rough_size(attributes.values(), level, size)


def _rough_size(values: Iterable[Any], level: int, size: int) -> int:
    """Add the values' own sizes to `size`, which has their number, and stop when it is more than LIGHT."""
    if level > MAX_LEVEL:
        return LIGHT + 1
    for value in values:
        kind = type(value)
        if kind is str or kind is bytes:
            size += len(value)
        elif kind is tuple or kind is list:
            size = _rough_size(value, level + 2, size + len(value))
        elif kind is dict:
            size += rough_size(value, level + 3)
        elif kind not in SCALARS:
            return LIGHT + 1
        if size > LIGHT:
            break
    return size


def weigh(item: object, limits: Limits) -> str | None:
    """Say why an item of `values`, or a value tree, would cost too much to store; None when it would not."""
    fields = size = 0
    texts: list[str] = []
    pending: list[Any] = [item]
    while pending and size <= limits.text_bytes:
        value = pending.pop()
        if isinstance(value, str):
            size += len(value)
            texts.append(value)
        elif isinstance(value, bytes):
            size += len(value) * 4 // 3  # base64
        elif isinstance(value, Mapping | Sequence):
            fields += len(value) * _fields_each(value)
            if fields > limits.fields:
                return f"it has more than {limits.fields:,} fields (attributes, events, links, and what they hold)"
            pending.extend(value)
            pending.extend(value.values() if isinstance(value, Mapping) else ())
    if limits.text_bytes // _MOST_GROWTH < size <= limits.text_bytes:
        width = max(map(_width, texts), default=1)
        size *= width
        if size <= limits.text_bytes:  # as mostly; to count takes a while
            size += sum(map(_growth, texts)) * width
    if size > limits.text_bytes:
        return f"its text takes {size:,} bytes or more as JSON; at most {limits.text_bytes:,} are allowed"
    return None


def cut(value: Any) -> Any:  # noqa: ANN401 - a value tree, or an item of `values`
    """Return a value with little of it left, and a note wherever something is missing."""
    return _Cut().cut(value)


class _Cut:
    """One cut; counts the values that are kept."""

    def __init__(self) -> None:
        self._left = _KEPT_VALUES

    def cut(self, value: Any) -> Any:  # noqa: ANN401 - as above
        if hasattr(value, "_fields"):
            return type(value)(*map(self.cut, value))
        self._left -= 1
        if isinstance(value, str):
            kept = value[:_KEPT_TEXT]
            return value if kept == value else f"{kept}… (cut: it had {len(value):,} characters)"
        if isinstance(value, bytes):
            return value[:_KEPT_TEXT]
        if isinstance(value, Mapping):
            return {self.cut(key): self.cut(inner) for key, inner in value.items() if self._left > 0}
        if isinstance(value, Sequence):
            kept_values = [self.cut(inner) for inner in value if self._left > 0]
            if len(kept_values) < len(value) and not any(hasattr(each, "_fields") for each in kept_values):
                kept_values.append(f"(cut: it had {len(value):,} elements)")
            return kept_values
        return value


def _fields_each(value: Mapping[Any, Any] | Sequence[Any]) -> int:
    if hasattr(value, "_fields"):  # one of our own: an event, a link
        return 1
    return _PAIR_FIELDS if isinstance(value, Mapping) else _ELEMENT_FIELDS


def _growth(text: str) -> int:
    return sum(map(text.count, _DOUBLED)) + 5 * sum(map(text.count, _ESCAPED))


def _width(text: str) -> int:
    """Return how wide a text's characters make all others in CPython, as decoding reckons it."""
    if text.isascii():
        return 1
    return 4 if sys.getsizeof(text) >= 4 * len(text) else 2
