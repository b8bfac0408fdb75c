"""Limits: what one request may cost before it is decoded, and whose turn it is to decode.

A byte on the wire can become a thousand in memory: two bytes are a whole span, event or attribute to protobuf. So
large requests are decoded in pieces, one at a time, and what even alone would make too many objects is refused
before it makes any.
"""

import os
import threading
from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The bounds of decoding."""

    piece_bytes: int = 64 * 2**10
    """What is decoded at once; larger items are decoded one by one. A field takes two bytes at least, so that a piece
    makes at most 32,768 objects: 24 MiB if all were links, the costliest [measured]."""

    parts: int = 700_000
    """Resources, scopes and items of a request. 64 MiB of spans of 100 bytes have fewer; with keys, facts and list
    slots a row takes about 1,000 bytes."""

    fields: int = 131_072
    """Fields of one item, resource or scope, at all levels: 95 MiB and a second if all were links [measured]."""

    text_bytes: int = 128 * 2**20
    """Text of one item, resource or scope, as CPython holds its JSON: escaped, and every character as wide as the
    widest. It is there three times while it is encoded."""

    shared_bytes: int = 4 * 2**20
    """Of one resource or scope: it is held several times for as long as its items are read."""

    repair_bytes: int = 16 * 2**20
    """The largest item, resource or scope whose invalid UTF-8 is repaired; each such byte becomes three."""


class Turns:
    """Lets one thread at a time through, in the order in which they came.

    A plain lock would go to the thread that released it last: a large request, which takes a turn a piece, would keep
    all small ones waiting to its end. `_lock` guards the rest.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = False
        self._waiting: deque[threading.Lock] = deque()

    def __enter__(self) -> None:
        with self._lock:
            if not self._taken:
                self._taken = True
                return
            call = threading.Lock()
            call.acquire()
            self._waiting.append(call)
        call.acquire()  # until it is released by whoever has the turn now

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False

    def reset(self) -> None:
        """Forget everybody: in a forked child, the threads that had or awaited a turn are gone."""
        self.__init__()  # type: ignore[misc] # the child has one thread, and nobody shares this object with it


DECODING = Turns()
"""The turn to decode a piece. Decoding holds the GIL: two at once would take twice the memory and no less time."""

os.register_at_fork(after_in_child=DECODING.reset)
