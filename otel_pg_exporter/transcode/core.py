"""Which core transcodes: the native one where there is one, else the reference in Python. Chosen once, at import."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from otel_pg_exporter.config import SERVER_PREFIX, CoreSettings, load
from otel_pg_exporter.errors import ConfigurationError
from otel_pg_exporter.mapping import Mapping
from otel_pg_exporter.model import Hold, RowBatch, Signal, Window, unbounded
from otel_pg_exporter.transcode import plan, wire
from otel_pg_exporter.transcode.limits import Limits
from otel_pg_exporter.transcode.plan import Plan


class Transcode(Protocol):
    """See `wire.transcode`."""

    def __call__(
        self,
        plan: Plan,
        body: bytes,
        *,
        now_ns: int,
        request_id: bytes | None = None,
        hold: Hold = unbounded,
        limits: Limits = wire.LIMITS,
    ) -> RowBatch:
        """Make rows of an OTLP export request."""


class Core(NamedTuple):
    """One core: what its plans are made by, and what follows them."""

    name: str
    compile_plan: Callable[[Mapping, Signal, Window], Plan]
    transcode: Transcode


def choose(wanted: str) -> Core:
    """Return the core that a setting wants: `auto`, `native` or `python`. Raises ConfigurationError."""
    if wanted != "python":
        try:
            from otel_pg_exporter.transcode import native
        except ImportError as exc:
            if wanted == "native":
                raise ConfigurationError(
                    f"{SERVER_PREFIX}CORE is native, but this installation has no native core ({exc}); "
                    "install Rust (https://rustup.rs) and then this package again, or leave the variable unset"
                ) from exc
        else:
            return Core("native", native.compile_plan, native.transcode)
    return Core("Python reference", plan.compile_plan, wire.transcode)


CORE, compile_plan, transcode = choose(load(CoreSettings, prefix=SERVER_PREFIX).core)

if CORE == "native":
    from otel_pg_exporter import _native

    extension = _native
else:
    extension = None  # type: ignore[assignment] # whoever uses it asks for it first
