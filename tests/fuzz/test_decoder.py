"""The decoder's targets, on what hypothesis generates."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_pg_exporter.model import Signal
from tests.fuzz.checks import TARGETS, check_pieces, check_wire_format
from tests.fuzz.strategies import bodies

any_body = st.sampled_from(list(Signal)).flatmap(bodies)


@pytest.mark.parametrize("signal", list(Signal))
@given(data=st.data())
def test_whatever_comes_becomes_sound_rows_or_a_refusal(signal: Signal, data: st.DataObject) -> None:
    TARGETS[signal.value](data.draw(bodies(signal)))


@given(body=any_body)
def test_the_size_of_pieces_changes_nothing_and_limits_only_refuse(body: bytes) -> None:
    check_pieces(body)


@given(body=any_body)
def test_walks_by_hand_stay_inside_the_bytes_and_agree_with_protobuf(body: bytes) -> None:
    check_wire_format(body)
