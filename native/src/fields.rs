//! Fields: one message's values, encoded in the order of `mapping.FIELDS`.
//!
//! Each function appends the encoded fields and returns the repairs they took. `anomalies`, the last field of a span
//! and of a log record, is left to the caller, who alone knows all repairs.

use blake2::Blake2b;
use blake2::digest::Digest;
use blake2::digest::consts::U16;

use crate::copy::{self, pg_time};
use crate::json::{Json, anomaly};
use crate::messages::{EntityRef, Event, Link, LogRecord, Resource, Scope, Span};
use crate::packed::Packed;
use crate::values::{Map, Value};
use crate::wire::Result;

/// How many fields each message has, `anomalies` included.
pub const SPAN_FIELDS: usize = 21;
pub const LOG_FIELDS: usize = 16;
pub const SCOPE_FIELDS: usize = 5;
pub const RESOURCE_FIELDS: usize = 5;
pub const REQUEST_FIELDS: usize = 1;

pub const TRACE_ID_BYTES: usize = 16;
pub const SPAN_ID_BYTES: usize = 8;
/// What an id begins with that a text should have held in hex, but did not: by itself longer than any id.
pub const NOT_HEX: &[u8] = b"not hexadecimal: ";
const NS_PER_MINUTE: u64 = 60_000_000_000;
const CANONICAL_V1: &[u8] = b"otel-pg-exporter resource 1\n";

/// Encode a span, whose ids are known to be valid.
pub fn span_fields(span: &Span<'_>, out: &mut Packed) -> Result<u32> {
    let mut found = 0;
    out.open().extend_from_slice(&[0, 0, 0, TRACE_ID_BYTES as u8]);
    out.push(span.trace_id);
    out.open().extend_from_slice(&[0, 0, 0, SPAN_ID_BYTES as u8]);
    out.push(span.span_id);
    found |= parent(span.parent_span_id, out)?;
    found |= text(span.trace_state, out)?;
    count(span.flags, out);
    found |= text(span.name, out)?;
    found |= enumeration(span.kind, out);
    found |= enumeration(span.status_code, out);
    found |= text(span.status_message, out)?;
    time(span.start, out);
    found |= end(span.start, span.end, out);
    found |= object(&span.attributes, out)?;
    count(span.dropped_attributes_count, out);
    found |= array(&span.events, event, out)?;
    count(span.dropped_events_count, out);
    found |= array(&span.links, link, out)?;
    count(span.dropped_links_count, out);
    if span.links.iter().any(|link| !is_whole(link.trace_id, link.span_id)) {
        found |= anomaly::INVALID_ID;
    }
    Ok(found)
}

/// Encode a log record; `when` is its own time, or what takes its place.
pub fn log_fields(record: &LogRecord<'_>, when: u64, out: &mut Packed) -> Result<u32> {
    let mut found = 0;
    time(when, out);
    if record.observed_time == 0 {
        null(out);
        null(out);
    } else {
        copy::int8(pg_time(record.observed_time), out.open());
        out.close();
        copy::int2((record.observed_time % 1000) as i16, out.open());
        out.close();
    }
    found |= enumeration(record.severity_number, out);
    found |= text(record.severity_text, out)?;
    found |= text(record.event_name, out)?;
    match &record.body {
        None => {
            null(out);
            null(out);
        }
        Some(Value::Text(body)) => {
            found |= text(body, out)?;
            null(out);
        }
        Some(body) => {
            null(out);
            found |= copy::jsonb(out.open(), |json| json.value(body))?;
            out.close();
        }
    }
    found |= optional_id(record.trace_id, TRACE_ID_BYTES, out)?;
    found |= optional_id(record.span_id, SPAN_ID_BYTES, out)?;
    count(record.flags, out);
    found |= object(&record.attributes, out)?;
    count(record.dropped_attributes_count, out);
    Ok(found)
}

pub fn scope_fields(scope: &Scope<'_>, out: &mut Packed) -> Result<u32> {
    let mut found = text(scope.name, out)?;
    found |= text(scope.version, out)?;
    found |= object(&scope.attributes, out)?;
    count(scope.dropped_attributes_count, out);
    found |= text(scope.schema_url, out)?;
    Ok(found)
}

/// Encode a resource; the first field, its id, is a hash of the others in their canonical form.
pub fn resource_fields(resource: &Resource<'_>, out: &mut Packed) -> Result<u32> {
    copy::bytea(&resource_id(resource), out.open())?;
    out.close();
    let mut found = object(&resource.attributes, out)?;
    count(resource.dropped_attributes_count, out);
    found |= array(&resource.entity_refs, entity_ref, out)?;
    found |= text(resource.schema_url, out)?;
    Ok(found)
}

fn resource_id(resource: &Resource<'_>) -> [u8; 16] {
    let mut canonical = CANONICAL_V1.to_vec();
    let mut json = Json::new(&mut canonical);
    json.sorted = true;
    json.raw("{\"attributes\":");
    json.map(&resource.attributes);
    json.raw(",\"dropped_attributes_count\":");
    json.unsigned(resource.dropped_attributes_count.into());
    json.raw(",\"entity_refs\":");
    json.array(&resource.entity_refs, |json, reference| {
        json.raw("{\"description_keys\":");
        json.array(&reference.description_keys, |json, key| json.text(key));
        json.raw(",\"id_keys\":");
        json.array(&reference.id_keys, |json, key| json.text(key));
        json.raw(",\"schema_url\":");
        json.text(reference.schema_url);
        json.raw(",\"type\":");
        json.text(reference.kind);
        json.raw("}");
    });
    json.raw(",\"schema_url\":");
    json.text(resource.schema_url);
    json.raw("}");
    Blake2b::<U16>::digest(&canonical).into()
}

fn null(out: &mut Packed) {
    out.push(&copy::NULL);
}

fn text(value: &str, out: &mut Packed) -> Result<u32> {
    let found = copy::text(value, out.open())?;
    out.close();
    Ok(found)
}

fn count(value: u32, out: &mut Packed) {
    copy::int8(value.into(), out.open());
    out.close();
}

/// Encode minute, microseconds and the nanoseconds that these cannot hold.
fn time(when: u64, out: &mut Packed) {
    copy::int4((when / NS_PER_MINUTE) as i32, out.open());
    out.close();
    copy::int8(pg_time(when), out.open());
    out.close();
    copy::int2((when % 1000) as i16, out.open());
    out.close();
}

fn enumeration(value: i32, out: &mut Packed) -> u32 {
    let stored = value.clamp(i16::MIN.into(), i16::MAX.into()) as i16;
    copy::int2(stored, out.open());
    out.close();
    if i32::from(stored) == value { 0 } else { anomaly::ENUM_SATURATED }
}

fn object(map: &Map<'_>, out: &mut Packed) -> Result<u32> {
    if map.is_empty() {
        null(out);
        return Ok(0);
    }
    let found = copy::jsonb(out.open(), |json| json.map(map))?;
    out.close();
    Ok(found)
}

fn array<T>(elements: &[T], write: impl Fn(&mut Json<'_>, &T), out: &mut Packed) -> Result<u32> {
    if elements.is_empty() {
        null(out);
        return Ok(0);
    }
    let found = copy::jsonb(out.open(), |json| json.array(elements, write))?;
    out.close();
    Ok(found)
}

fn parent(id: &[u8], out: &mut Packed) -> Result<u32> {
    if is_zero(id) {
        null(out);
        return Ok(if id.is_empty() { 0 } else { anomaly::INVALID_ID });
    }
    copy::bytea(id, out.open())?;
    out.close();
    Ok(if id.len() == SPAN_ID_BYTES { 0 } else { anomaly::INVALID_ID })
}

fn optional_id(id: &[u8], size: usize, out: &mut Packed) -> Result<u32> {
    if id.len() != size || is_zero(id) {
        null(out);
        return Ok(if id.is_empty() { 0 } else { anomaly::INVALID_ID });
    }
    copy::bytea(id, out.open())?;
    out.close();
    Ok(0)
}

/// Encode end time and duration; both are NULL for a span whose sender left the end at 0.
fn end(start: u64, end: u64, out: &mut Packed) -> u32 {
    if end == 0 {
        null(out);
        null(out);
        return 0;
    }
    let duration = i128::from(end) - i128::from(start);
    let saturated = duration.clamp(i64::MIN.into(), i64::MAX.into()) as i64;
    copy::int8(pg_time(end), out.open());
    out.close();
    copy::int8(saturated, out.open());
    out.close();
    if i128::from(saturated) == duration { 0 } else { anomaly::DURATION_SATURATED }
}

pub fn is_zero(id: &[u8]) -> bool {
    id.iter().all(|byte| *byte == 0)
}

fn is_whole(trace_id: &[u8], span_id: &[u8]) -> bool {
    trace_id.len() == TRACE_ID_BYTES && span_id.len() == SPAN_ID_BYTES && !is_zero(trace_id) && !is_zero(span_id)
}

fn event(json: &mut Json<'_>, event: &Event<'_>) {
    json.raw("{\"time_unix_nano\":");
    json.unsigned(event.time);
    json.raw(",\"name\":");
    json.text(event.name);
    json.raw(",\"attributes\":");
    json.map(&event.attributes);
    json.raw(",\"dropped_attributes_count\":");
    json.unsigned(event.dropped_attributes_count.into());
    json.raw("}");
}

fn link(json: &mut Json<'_>, link: &Link<'_>) {
    json.raw("{\"trace_id\":\"");
    json.hex(link.trace_id);
    json.raw("\",\"span_id\":\"");
    json.hex(link.span_id);
    json.raw("\",\"trace_state\":");
    json.text(link.trace_state);
    json.raw(",\"attributes\":");
    json.map(&link.attributes);
    json.raw(",\"dropped_attributes_count\":");
    json.unsigned(link.dropped_attributes_count.into());
    json.raw(",\"flags\":");
    json.unsigned(link.flags.into());
    json.raw("}");
}

fn entity_ref(json: &mut Json<'_>, reference: &EntityRef<'_>) {
    json.raw("{\"schema_url\":");
    json.text(reference.schema_url);
    json.raw(",\"type\":");
    json.text(reference.kind);
    json.raw(",\"id_keys\":");
    json.array(&reference.id_keys, |json, key| json.text(key));
    json.raw(",\"description_keys\":");
    json.array(&reference.description_keys, |json, key| json.text(key));
    json.raw("}");
}
