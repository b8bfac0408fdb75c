"""The resource id is part of the schema: rows of old and new versions, and of both cores, must agree on it."""

import hashlib
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans

from tests.transcode.support import span, traces


def resource_id(resource: dict[str, Any]) -> bytes:
    group = ParseDict(resource, ResourceSpans())
    group.scope_spans.add().spans.append(span())
    (identity,) = traces(b"\x0a" + _length(group.SerializeToString())).resources
    return identity


def _length(data: bytes) -> bytes:
    assert len(data) < 2**14
    return bytes([len(data) & 0x7F | 0x80, len(data) >> 7]) + data


def strings(**pairs: str) -> list[dict[str, Any]]:
    return [{"key": key, "value": {"stringValue": value}} for key, value in pairs.items()]


@pytest.mark.parametrize(
    ("resource", "canonical", "identity"),
    [
        (
            {},
            '{"attributes":{},"dropped_attributes_count":0,"entity_refs":[],"schema_url":""}',
            "3ae20178c673a72b684971f1f3eaa313",
        ),
        (
            {"resource": {"attributes": strings(b="ü\0", a="1")}, "schemaUrl": "https://s"},
            (
                '{"attributes":{"a":"1","b":"ü\ufffd"},"dropped_attributes_count":0,"entity_refs":[],'
                '"schema_url":"https://s"}'
            ),
            "42c63ac0aeb2149cea8e88cf41b7dce0",
        ),
        (
            {
                "resource": {
                    "attributes": [
                        {"key": "n", "value": {"intValue": "-9223372036854775808"}},
                        {"key": "d", "value": {"doubleValue": 1e16}},
                        {"key": "inf", "value": {"doubleValue": "Infinity"}},
                        {"key": "b", "value": {"bytesValue": "/w=="}},
                        {"key": "u", "value": {}},
                        {"key": "list", "value": {"arrayValue": {"values": [{"boolValue": True}]}}},
                        {"key": "map", "value": {"kvlistValue": {"values": strings(z="1", a="2")}}},
                    ],
                    "droppedAttributesCount": 3,
                    "entityRefs": [{"schemaUrl": "s", "type": "host", "idKeys": ["k"], "descriptionKeys": ["d"]}],
                }
            },
            (
                '{"attributes":{"b":"/w==","d":1e+16,"inf":"Infinity","list":[true],"map":{"a":"2","z":"1"},'
                '"n":-9223372036854775808,"u":null},"dropped_attributes_count":3,"entity_refs":'
                '[{"description_keys":["d"],"id_keys":["k"],"schema_url":"s","type":"host"}],"schema_url":""}'
            ),
            "2d2b2eb040d98215a3e941fabef4dab6",
        ),
    ],
    ids=["empty", "text", "every type"],
)
def test_the_id_is_the_hash_of_the_canonical_form(resource: dict[str, Any], canonical: str, identity: str) -> None:
    found = resource_id(resource)

    assert found.hex() == identity
    assert found == hashlib.blake2b(b"otel-pg-exporter resource 1\n" + canonical.encode(), digest_size=16).digest()


def test_the_order_of_attributes_does_not_matter_and_their_types_do() -> None:
    assert resource_id({"resource": {"attributes": strings(a="1", b="2")}}) == resource_id(
        {"resource": {"attributes": strings(b="2", a="1")}}
    )
    number = [{"key": "a", "value": {"intValue": "1"}}]
    assert resource_id({"resource": {"attributes": strings(a="1")}}) != resource_id(
        {"resource": {"attributes": number}}
    )
