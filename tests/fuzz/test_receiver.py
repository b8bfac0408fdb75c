"""The whole house under hostile bytes: a socket in front, a real PostgreSQL behind."""

import hashlib

import grpc
from hypothesis import given, settings
from hypothesis import strategies as st

from otel_pg_exporter.model import Signal
from tests.e2e.support import METHODS, Receiver, heard
from tests.fuzz.strategies import bodies
from tests.receiver.support import refusal

# A commit takes a hundred times as long as a look at the bytes alone.
_settings = settings(max_examples=max(1, settings().max_examples // 3))
_FINAL = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED}


@_settings
@given(
    sent=st.sampled_from(list(Signal)).flatmap(lambda signal: st.tuples(st.just(signal), bodies(signal))),
    protocol=st.sampled_from(["grpc", "http"]),
)
def test_whatever_comes_is_stored_or_refused_with_a_reason(
    fuzzed_receivers: dict[str, Receiver], sent: tuple[Signal, bytes], protocol: str
) -> None:
    signal, body = sent
    fuzzed_receiver = fuzzed_receivers[protocol]
    database, service = fuzzed_receiver.database, fuzzed_receiver.service
    before, rows_before = service.counts(), database.count(signal.table)
    try:
        rejected, message = heard(fuzzed_receiver.client.export(METHODS[signal], body))
    except grpc.RpcError as exc:
        refused = refusal(exc)
        assert refused.code in _FINAL, refused
        assert "internal" not in refused.details
        assert service.counts() == before
        assert database.count(signal.table) == rows_before
        return
    counts = service.counts()
    assert counts.balanced
    assert counts.refused == before.refused
    assert counts.stored - before.stored == database.count(signal.table) - rows_before
    assert counts.rejected - before.rejected == rejected
    assert bool(rejected) == bool(message)
    request_id = hashlib.blake2b(signal.value.encode() + body, digest_size=16).digest()
    letters = database.rows("SELECT count(*) FROM dead_letters WHERE request_id = %s", request_id.hex())
    assert letters == [(rejected,)]
    if signal is Signal.TRACES:
        database.assert_traces_exact()
