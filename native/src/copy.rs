//! Binary COPY: a field is an int32 length and that many bytes; NULL has the length -1.

use crate::json::{Json, anomaly, repair};
use crate::wire::{Result, Unusual};

pub const NULL: [u8; 4] = [0xff; 4];

const EPOCH_US: i64 = 946_684_800_000_000; // 2000-01-01 UTC, in microseconds since 1970
const JSONB_VERSION: u8 = 1;
const NO_LENGTH: usize = 4;

/// Return a time as timestamptz has it: whole microseconds since 2000-01-01 UTC.
pub fn pg_time(nanoseconds: u64) -> i64 {
    (nanoseconds / 1000) as i64 - EPOCH_US
}

/// Return a field's bytes without their length; `None` for NULL.
pub fn content(field: &[u8]) -> Option<&[u8]> {
    if field == NULL { None } else { field.get(NO_LENGTH..) }
}

pub fn null(out: &mut Vec<u8>) {
    out.extend_from_slice(&NULL);
}

pub fn int2(value: i16, out: &mut Vec<u8>) {
    out.extend_from_slice(&[0, 0, 0, 2]);
    out.extend_from_slice(&value.to_be_bytes());
}

pub fn int4(value: i32, out: &mut Vec<u8>) {
    out.extend_from_slice(&[0, 0, 0, 4]);
    out.extend_from_slice(&value.to_be_bytes());
}

pub fn int8(value: i64, out: &mut Vec<u8>) {
    out.extend_from_slice(&[0, 0, 0, 8]);
    out.extend_from_slice(&value.to_be_bytes());
}

pub fn float8(value: f64, out: &mut Vec<u8>) {
    int8(value.to_bits() as i64, out);
}

pub fn boolean(value: bool, out: &mut Vec<u8>) {
    out.extend_from_slice(&[0, 0, 0, 1, u8::from(value)]);
}

/// Encode bytes, or text that holds no NUL.
pub fn bytea(value: &[u8], out: &mut Vec<u8>) -> Result<()> {
    let length = i32::try_from(value.len()).map_err(|_| Unusual)?;
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(value);
    Ok(())
}

/// Encode text as it can be stored; return the repairs that it took.
pub fn text(value: &str, out: &mut Vec<u8>) -> Result<u32> {
    let (value, repaired) = repair(value);
    bytea(value.as_bytes(), out)?;
    Ok(if repaired { anomaly::TEXT_REPAIRED } else { 0 })
}

/// Encode a JSON document, which `write` spells; return the repairs that it took.
pub fn jsonb(out: &mut Vec<u8>, write: impl FnOnce(&mut Json<'_>)) -> Result<u32> {
    let start = out.len();
    out.extend_from_slice(&NULL);
    out.push(JSONB_VERSION);
    let mut json = Json::new(out);
    write(&mut json);
    let anomalies = json.anomalies;
    let length = i32::try_from(out.len() - start - NO_LENGTH).map_err(|_| Unusual)?;
    let place = out.get_mut(start..start + NO_LENGTH).ok_or(Unusual)?;
    place.copy_from_slice(&length.to_be_bytes());
    Ok(anomalies)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::values::Value;

    #[test]
    fn a_document_has_its_length_and_version_before_it() {
        let mut out = vec![7];
        assert_eq!(jsonb(&mut out, |json| json.value(&Value::Int(42))), Ok(0));
        assert_eq!(out, b"\x07\0\0\0\x03\x0142");
    }

    #[test]
    fn times_reach_as_far_as_otlp() {
        assert_eq!(pg_time(0), -EPOCH_US);
        assert_eq!(pg_time(u64::MAX), 18_446_744_073_709_551 - EPOCH_US);
    }
}
