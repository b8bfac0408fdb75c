# The native core, built from `native/`; absent where the build found no Rust toolchain.

from collections.abc import Sequence
from typing import overload
from typing import TypeAlias

from otel_pg_exporter.model import Hold, SpanFacts

PickArguments: TypeAlias = tuple[str, int | None, Sequence[tuple[str, int, str | None]]]
RowArguments: TypeAlias = tuple[
    Sequence[int], Sequence[int], Sequence[int], Sequence[PickArguments], Sequence[PickArguments], int | None
]

FIELDS: dict[str, int]

class Plan:
    def __init__(self, signal: str, rows: RowArguments, resources: RowArguments) -> None: ...

class Rows(Sequence[bytes]):
    def __len__(self) -> int: ...
    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[bytes]: ...

class Facts(Sequence[SpanFacts]):
    def __len__(self) -> int: ...
    @overload
    def __getitem__(self, index: int) -> SpanFacts: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[SpanFacts]: ...

def transcode(
    plan: Plan,
    body: bytes,
    request_id: bytes,
    *,
    now_ns: int,
    window: tuple[int, int],
    limits: tuple[int, int, int],
    max_batch_bytes: int,
    hold: Hold | None,
) -> (
    tuple[
        Rows,
        Rows,
        Facts,
        list[int],
        list[bytes],
        dict[bytes, bytes],
        list[int],
        list[tuple[int, str]],
        list[int],
        int,
    ]
    | None
): ...
