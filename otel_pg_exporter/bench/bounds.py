"""What kept a part at full speed from being faster, told from its figures alone."""

from otel_pg_exporter.bench.run import BATCH_STAGES, Results, Throughput
from otel_pg_exporter.telemetry import Stage

_FULL = 0.9  # share of a core, or of all, from which on it counts as used up
_BUSY = 0.7  # share of their time from which on writers set the pace
_MUCH = 0.4  # share of the writers' time that is worth a remedy
_MOST = 0.5  # share of a request's time until it is with a writer

_STATEMENTS = tuple(stage for stage in BATCH_STAGES if stage not in {Stage.MERGE, Stage.COMMIT})


def bounds(part: Throughput, results: Results) -> list[str]:
    """Say in a sentence or two what bounds, the closest bound first."""
    if slow := _reference(part, results):
        return [slow]  # whose threads all else waits for: it looks busy, too
    found = [sentence for sentence in (_generator(part), _writers(part, results), _machine(part, results)) if sentence]
    return found[:2] or [_idle(part, results)]


def _idle(part: Throughput, results: Results) -> str:
    busy = f"writers {part.busy(results.writers):.0%} busy"
    if results.linger:
        return f"The writers waited for more, up to {results.linger:g} seconds each time ({busy}): a shorter --linger."
    return f"Nothing was used up ({busy}): more --senders or --items would get more."


def _generator(part: Throughput) -> str:
    if part.sent.cpu_share < _FULL:
        return ""
    return f"The load generator set the pace: it took {part.sent.cpu_share:.2f} cores, and has one at most."


def _reference(part: Throughput, results: Results) -> str:
    """Judge the core in Python, of which one thread at a time runs."""
    transcoding = part.share(Stage.TRANSCODE)
    if results.core == "native" or (part.receiver_cores < _FULL and transcoding < _MOST):
        return ""
    return (
        f"The core in Python bounds: the receiver takes {part.receiver_cores:.2f} cores and can use little more than "
        f"one, and {transcoding:.0%} of a request's time goes to transcoding; the native core is what helps."
    )


def _writers(part: Throughput, results: Results) -> str:
    busy = part.busy(results.writers)
    if busy < _BUSY:
        return ""
    commit = part.share(Stage.COMMIT)
    statements = sum(part.share(stage) for stage in _STATEMENTS)
    writers = "writer was" if results.writers == 1 else f"{results.writers} writers were"
    start = f"The {writers} busy {busy:.0%} of the time"
    if commit >= _MUCH and commit >= statements:
        return (
            f"The flush to PostgreSQL's disk bounds: {start[0].lower()}{start[1:]}, {commit:.0%} of that in COMMIT; "
            "more --writers or a --linger share flushes."
        )
    if statements >= _MUCH:
        return (
            f"PostgreSQL bounds: {start[0].lower()}{start[1:]}, {statements:.0%} of that in its statements (COPY "
            f"{part.share(Stage.COPY):.0%}, traces {part.share(Stage.TRACES):.0%}); more --writers help while it has "
            "free cores."
        )
    return f"{start}, {part.share(Stage.MERGE):.0%} of that in merging: the receiver's own work."


def _machine(part: Throughput, results: Results) -> str:
    used = part.receiver_cores + part.sent.cpu_share + (part.postgres_cores or 0.0)
    if used < _FULL * results.cores:
        return ""
    others = "the load generator" if part.postgres_cores is None else "the load generator and PostgreSQL"
    return (
        f"The receiver and {others} used {used:.1f} of this machine's {results.cores} cores, and slow each other down."
    )
