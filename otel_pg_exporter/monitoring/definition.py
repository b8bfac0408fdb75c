"""What a metric is, and what several of them share: names, units and meanings are in `groups` and `histograms`."""

import enum
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from opentelemetry.metrics import Observation

R = TypeVar("R")

Observations = Iterable[Observation]


class Kind(enum.Enum):
    """What a metric is, in OpenTelemetry's words."""

    COUNTER = "counter"
    UP_DOWN_COUNTER = "updowncounter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """What is known of a metric, whoever shows it."""

    name: str
    kind: Kind
    unit: str  # UCUM
    description: str
    attributes: tuple[str, ...] = ()

    @property
    def prometheus(self) -> str:
        """What Prometheus calls it; a histogram's samples end in `_bucket`, `_sum` and `_count`."""
        unit = {"s": "_seconds", "By": "_bytes"}.get(self.unit, "")
        return self.name.replace(".", "_") + unit + ("_total" if self.kind is Kind.COUNTER else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Instrument(Generic[R]):
    """A metric that is read when somebody asks, from a reading that it shares with its group."""

    definition: Definition
    observe: Callable[[R], Observations]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group(Generic[R]):
    """Metrics that are observed in one reading, so that they agree with each other."""

    title: str
    instruments: tuple[Instrument[R], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """A metric to which a value is added now and then: once a call, or once a batch."""

    definition: Definition
    boundaries: tuple[float, ...]


def instrument(
    name: str, kind: Kind, unit: str, description: str, observe: Callable[[R], Observations], *attributes: str
) -> Instrument[R]:
    """Define a metric of a group."""
    definition = Definition(name=name, kind=kind, unit=unit, description=description, attributes=attributes)
    return Instrument(definition=definition, observe=observe)


def one(value: Callable[[R], float | None]) -> Callable[[R], Observations]:
    """Observe a single value, where there is one."""

    def observe(reading: R) -> Iterator[Observation]:
        if (found := value(reading)) is not None:
            yield Observation(found)

    return observe


def each(attribute: str, values: Callable[[R], Mapping[str, float]]) -> Callable[[R], Observations]:
    """Observe a value for each value of an attribute."""
    return lambda reading: [Observation(value, {attribute: key}) for key, value in values(reading).items()]
