"""Requests merged into one batch: rows sorted by key, doubles attached to their survivor, outcomes taken apart again.

A row is named by its position in the merged batch, a plain int.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import cached_property
from itertools import chain, repeat
from typing import TypeVar

from otel_pg_exporter.model import Anomaly, Outcome, Rejection, RowBatch, Signal, SpanFacts, rejection_message
from otel_pg_exporter.transcode import extension

T = TypeVar("T")


class Merged:
    """Several requests of one signal, to be written in one transaction.

    Rows of spans are in key order: it is the order of locks, and the one that the index likes best.
    """

    def __init__(self, batches: Sequence[RowBatch]) -> None:
        self.signal: Signal = batches[0].signal
        self.batches = batches
        self.rows = _joined([batch.rows for batch in batches])
        self.keys = _joined([batch.keys for batch in batches])
        self.facts = _joined_facts([batch.facts for batch in batches])
        self.resources: dict[bytes, bytes] = dict(chain.from_iterable(batch.resources.items() for batch in batches))
        self.days: frozenset[int] = frozenset().union(*(batch.days for batch in batches))
        self.survivors: Sequence[int] = range(len(self.rows))
        self.doubles: dict[int, list[int]] = {}  # survivor to the other rows with its key
        if self.keys:
            self.survivors, self.doubles = in_key_order(self.keys)
        self._group_of: dict[int, int] | None = None  # double to survivor, made when first asked for

    # These hold an object a row, and are made when something went wrong.

    @cached_property
    def resource_ids(self) -> list[bytes]:
        """The resource of each row."""
        return _concatenated(batch.resource_ids for batch in self.batches)

    @cached_property
    def owners(self) -> list[int]:
        """The index of the request that brought each row."""
        return _concatenated(repeat(index, len(batch.rows)) for index, batch in enumerate(self.batches))

    @cached_property
    def items(self) -> list[int]:
        """Which item of its request each row is."""
        return _concatenated(batch.items for batch in self.batches)

    def alternatives(self, row: int) -> list[int]:
        """List all rows that share `row`'s key, in the order in which they may take each other's place."""
        if self.doubles and self._group_of is None:
            self._group_of = {double: survivor for survivor, rows in self.doubles.items() for double in rows}
        survivor = row if self._group_of is None else self._group_of.get(row, row)
        return [survivor, *self.doubles.get(survivor, ())]

    def repairs(self) -> Mapping[Anomaly, int]:
        """Add up what was repaired in all requests."""
        total: Counter[Anomaly] = Counter()
        for batch in self.batches:
            total.update(batch.repairs)
        return total


def in_key_order(keys: Sequence[bytes]) -> tuple[Sequence[int], dict[int, list[int]]]:
    """Return one row a key, in key order, and for those that have any the other rows with their key."""
    if extension is not None and isinstance(keys, extension.Rows):
        rows, others = keys.order()
        return rows, dict(others)
    order = sorted(range(len(keys)), key=keys.__getitem__)
    survivors = order[:1]
    doubles: dict[int, list[int]] = {}
    for row in order[1:]:
        if keys[row] == keys[survivors[-1]]:
            doubles.setdefault(survivors[-1], []).append(row)
        else:
            survivors.append(row)
    return survivors, doubles


class Tally:
    """What became of each row of a `Merged` batch, in one attempt to write it."""

    def __init__(self, merged: Merged) -> None:
        self._merged = merged
        self._stored: list[Sequence[int]] = []  # in the pieces in which they were stored
        self.rejected: dict[int, Rejection] = {}
        self.replayed: dict[int, Outcome] = {}  # index of a request that was committed before, to its answer
        self.coalesced: dict[int, int] = {}  # index of a request to that of an equal one in the same batch

    @property
    def stored(self) -> Sequence[int]:
        """The rows that are stored."""
        return self._stored[0] if len(self._stored) == 1 else _concatenated(self._stored)

    def candidates(self) -> Sequence[int]:
        """List one row a key that may still be stored, in the order of locks."""
        merged = self._merged
        if not (self.rejected or self.replayed or self.coalesced):
            return merged.survivors
        skipped = self.replayed.keys() | self.coalesced.keys()
        chosen = (
            next((row for row in merged.alternatives(survivor) if row not in self.rejected), None)
            for survivor in merged.survivors
            if merged.owners[survivor] not in skipped
        )
        return [row for row in chosen if row is not None]

    def store(self, candidates: Sequence[int], inserted: AbstractSet[bytes] | None = None) -> None:
        """Note that of `candidates` those with an `inserted` key are stored; None: all of them."""
        if inserted is None:
            self._stored.append(candidates)
        else:
            keys = self._merged.keys
            self._stored.append([row for row in candidates if keys[row] in inserted])

    def reject(self, row: int, reason: str, sqlstate: str | None) -> None:
        """Note that PostgreSQL refuses one row."""
        self.rejected[row] = Rejection(item=self._merged.items[row], reason=reason, sqlstate=sqlstate)

    def rejections(self, index: int) -> list[Rejection]:
        """List what request `index` lost: in transcoding, then in PostgreSQL."""
        own = [each for row, each in self.rejected.items() if self._merged.owners[row] == index]
        return [*self._merged.batches[index].rejected, *own]

    def outcomes(self) -> list[Outcome]:
        """Answer each request."""
        answers = self._own_outcomes()
        for index, first in self.coalesced.items():
            rejected = answers[first].rejected
            answers[index] = Outcome(
                duplicate=self._merged.batches[index].item_count - rejected,
                rejected=rejected,
                error_message=answers[first].error_message,
            )
        return answers

    def _own_outcomes(self) -> list[Outcome]:
        merged = self._merged
        stored = self._stored_of_each()
        conflicts = Counter(
            merged.owners[double]
            for survivor, doubles in merged.doubles.items()
            for double in doubles
            if merged.rows[double] != merged.rows[survivor] and double not in self.rejected
        )
        answers = []
        for index, batch in enumerate(merged.batches):
            if index in self.replayed:
                answers.append(self.replayed[index])
                continue
            rejections = self.rejections(index)
            answers.append(
                Outcome(
                    stored=stored[index],
                    duplicate=batch.item_count - stored[index] - len(rejections),
                    duplicate_conflict=conflicts[index],
                    rejected=len(rejections),
                    error_message=rejection_message(batch, rejections),
                )
            )
        return answers

    def _stored_of_each(self) -> Mapping[int, int]:
        """Count what is stored of each request; mostly that is all."""
        merged, stored = self._merged, self.stored
        if len(stored) == len(merged.rows):
            return {index: len(batch.rows) for index, batch in enumerate(merged.batches)}
        return Counter(merged.owners[row] for row in stored)


def _joined(parts: Sequence[Sequence[bytes]]) -> Sequence[bytes]:
    return _concatenated(parts) if extension is None else extension.Rows.join(parts)


def _joined_facts(parts: Sequence[Sequence[SpanFacts]]) -> Sequence[SpanFacts]:
    return _concatenated(parts) if extension is None else extension.Facts.join(parts)


def _concatenated(parts: Iterable[Iterable[T]]) -> list[T]:
    return list(chain.from_iterable(parts))
