# The native core, built from `native/`; absent where the build found no Rust toolchain.

from collections.abc import Iterator, Sequence
from typing import TypeAlias, overload

from otel_pg_exporter.model import Hold, SpanFacts

PickArguments: TypeAlias = tuple[str, int | None, Sequence[tuple[str, int, str | None]]]
RowArguments: TypeAlias = tuple[
    Sequence[int], Sequence[int], Sequence[int], Sequence[PickArguments], Sequence[PickArguments], int | None
]

FIELDS: dict[str, int]

class Plan:
    def __init__(self, signal: str, rows: RowArguments, resources: RowArguments) -> None: ...

class Rows(Sequence[bytes]):
    @staticmethod
    def join(parts: Sequence[Sequence[bytes]]) -> Rows: ...
    def order(self) -> tuple[Positions, list[tuple[int, list[int]]]]: ...
    def gather(self, rows: Sequence[int], piece_bytes: int) -> Iterator[bytes]: ...
    def __len__(self) -> int: ...
    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[bytes]: ...

class Positions(Sequence[int]):
    def __len__(self) -> int: ...
    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...

class Facts(Sequence[SpanFacts]):
    @staticmethod
    def join(parts: Sequence[Sequence[SpanFacts]]) -> Facts: ...
    def __len__(self) -> int: ...
    @overload
    def __getitem__(self, index: int) -> SpanFacts: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[SpanFacts]: ...

class Traces:
    def __init__(self, facts: Facts, rows: Sequence[int]) -> None: ...
    @property
    def ids(self) -> list[bytes]: ...
    def parameters(self, ids: Sequence[bytes], oids: Sequence[int]) -> list[bytes]: ...

def transcode(
    plan: Plan,
    body: bytes,
    request_id: bytes | None,
    *,
    now_ns: int,
    window: tuple[int, int],
    limits: tuple[int, int, int],
    room: tuple[int, int],
    hold: Hold | None,
) -> (
    tuple[
        bytes | None,
        Rows,
        Rows,
        Facts,
        list[int] | None,
        Rows,
        dict[bytes, bytes],
        list[int],
        list[tuple[int, str]],
        list[int],
        int,
    ]
    | None
): ...
