//! JSON that jsonb accepts, as Python's `json` spells it: no blanks, UTF-8 as it is, and the normalisations of values.

use std::borrow::Cow;
use std::collections::HashMap;
use std::collections::hash_map::Entry;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use crate::numbers;
use crate::values::{Map, Value};

/// Bits of the column `anomalies`; the meaning of each is in `otel_pg_exporter/model.py`.
pub mod anomaly {
    pub const TEXT_REPAIRED: u32 = 1;
    pub const NON_FINITE: u32 = 4;
    pub const BYTES_VALUE: u32 = 8;
    pub const DUPLICATE_KEY: u32 = 16;
    pub const INVALID_ID: u32 = 32;
    pub const TIME_SUBSTITUTED: u32 = 64;
    pub const TIME_OUTSIDE_WINDOW: u32 = 128;
    pub const DURATION_SATURATED: u32 = 256;
    pub const ENUM_SATURATED: u32 = 512;
    pub const TEXT_CUT: u32 = 1024;
    /// How many bits there are.
    pub const COUNT: usize = 11;
}

pub const REPLACEMENT: &str = "\u{fffd}";

const HEX: &[u8; 16] = b"0123456789abcdef";

/// Appends JSON to a buffer, and notes what it had to repair.
pub struct Json<'o> {
    pub out: &'o mut Vec<u8>,
    pub anomalies: u32,
    /// Whether the keys of every object are sorted by code point.
    pub sorted: bool,
}

impl<'o> Json<'o> {
    pub fn new(out: &'o mut Vec<u8>) -> Self {
        Self { out, anomalies: 0, sorted: false }
    }

    pub fn value(&mut self, value: &Value<'_>) {
        match value {
            Value::Null => self.raw("null"),
            Value::Bool(true) => self.raw("true"),
            Value::Bool(false) => self.raw("false"),
            Value::Int(number) => self.raw(itoa::Buffer::new().format(*number)),
            Value::Double(number) => self.double(*number),
            Value::Text(text) => self.text(text),
            Value::Bytes(bytes) => self.bytes(bytes),
            Value::Array(values) => self.array(values, Self::value),
            Value::Map(map) => self.map(map),
        }
    }

    pub fn unsigned(&mut self, number: u64) {
        self.raw(itoa::Buffer::new().format(number));
    }

    pub fn raw(&mut self, text: &str) {
        self.out.extend_from_slice(text.as_bytes());
    }

    pub fn array<T>(&mut self, elements: &[T], write: impl Fn(&mut Self, &T)) {
        self.out.push(b'[');
        for (index, element) in elements.iter().enumerate() {
            if index > 0 {
                self.out.push(b',');
            }
            write(self, element);
        }
        self.out.push(b']');
    }

    pub fn map(&mut self, map: &Map<'_>) {
        if self.sorted || map.iter().any(|(key, _)| has_nul(key)) {
            self.repaired_map(map);
            return;
        }
        self.out.push(b'{');
        for (index, (key, value)) in map.iter().enumerate() {
            if index > 0 {
                self.out.push(b',');
            }
            self.text(key);
            self.out.push(b':');
            self.value(value);
        }
        self.out.push(b'}');
    }

    /// Keys that become equal by their repair meet here: the last wins, in the place of the first.
    fn repaired_map(&mut self, map: &Map<'_>) {
        let mut entries: Vec<(Cow<str>, &Value)> = Vec::with_capacity(map.len());
        let mut places = HashMap::new();
        for (key, value) in map {
            let name = self.repair(key);
            match places.entry(name.clone()) {
                Entry::Vacant(place) => {
                    place.insert(entries.len());
                    entries.push((name, value));
                }
                Entry::Occupied(place) => {
                    self.anomalies |= anomaly::DUPLICATE_KEY;
                    if let Some(entry) = entries.get_mut(*place.get()) {
                        let lost = std::mem::replace(&mut entry.1, value);
                        self.note_repairs(lost);
                    }
                }
            }
        }
        if self.sorted {
            entries.sort_by(|one, other| one.0.cmp(&other.0));
        }
        self.out.push(b'{');
        for (index, (name, value)) in entries.iter().enumerate() {
            if index > 0 {
                self.out.push(b',');
            }
            self.text(name);
            self.out.push(b':');
            self.value(value);
        }
        self.out.push(b'}');
    }

    /// Note what a value needed, although another takes its place.
    fn note_repairs(&mut self, value: &Value<'_>) {
        let before = self.out.len();
        self.value(value);
        self.out.truncate(before);
    }

    fn repair<'t>(&mut self, text: &'t str) -> Cow<'t, str> {
        let (text, repaired) = repair(text);
        if repaired {
            self.anomalies |= anomaly::TEXT_REPAIRED;
        }
        text
    }

    fn double(&mut self, number: f64) {
        if number.is_finite() {
            numbers::double(number, self.out);
            return;
        }
        self.anomalies |= anomaly::NON_FINITE;
        self.raw(if number.is_nan() {
            "\"NaN\""
        } else if number > 0.0 {
            "\"Infinity\""
        } else {
            "\"-Infinity\""
        });
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.anomalies |= anomaly::BYTES_VALUE;
        self.out.push(b'"');
        // In pieces, so that megabytes of bytes need no second buffer of their size.
        let mut encoded = String::new();
        for piece in bytes.chunks(3 * 1024) {
            encoded.clear();
            STANDARD.encode_string(piece, &mut encoded);
            self.out.extend_from_slice(encoded.as_bytes());
        }
        self.out.push(b'"');
    }

    pub fn hex(&mut self, bytes: &[u8]) {
        let digit = |value: u8| HEX.get(usize::from(value & 15)).copied().unwrap_or(b'0');
        self.out.extend(bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(*byte)]));
    }

    pub fn text(&mut self, text: &str) {
        self.out.push(b'"');
        let mut rest = text.as_bytes();
        loop {
            let (plain, after) = rest.split_at_checked(plain_prefix(rest)).unwrap_or((rest, &[]));
            self.out.extend_from_slice(plain);
            let Some((&byte, after)) = after.split_first() else {
                break;
            };
            self.escape(byte);
            rest = after;
        }
        self.out.push(b'"');
    }

    fn escape(&mut self, byte: u8) {
        let short = match byte {
            b'"' | b'\\' => byte,
            b'\n' => b'n',
            b'\r' => b'r',
            b'\t' => b't',
            0x0c => b'f',
            0x08 => b'b',
            0 => {
                self.anomalies |= anomaly::TEXT_REPAIRED;
                self.raw(REPLACEMENT);
                return;
            }
            _ => {
                self.raw("\\u00");
                self.hex(&[byte]);
                return;
            }
        };
        self.out.extend_from_slice(&[b'\\', short]);
    }
}

fn is_escaped(byte: u8) -> bool {
    byte < 0x20 || byte == b'"' || byte == b'\\'
}

/// How many bytes need no escape: eight at a time, with arithmetic on all of them at once.
///
/// In each difference a byte's highest bit tells of a hit; a borrow may add false ones above the first, but none below.
#[inline]
fn plain_prefix(bytes: &[u8]) -> usize {
    const ONES: u64 = 0x0101_0101_0101_0101;
    const HIGH: u64 = ONES << 7;
    let mut rest = bytes;
    while let Some((word, after)) = rest.split_first_chunk() {
        let word = u64::from_le_bytes(*word);
        let quote = word ^ (ONES * u64::from(b'"'));
        let backslash = word ^ (ONES * u64::from(b'\\'));
        let control = word.wrapping_sub(ONES * 0x20) & !word;
        let hits = (control | quote.wrapping_sub(ONES) & !quote | backslash.wrapping_sub(ONES) & !backslash) & HIGH;
        if hits != 0 {
            return bytes.len() - rest.len() + (hits.trailing_zeros() / 8) as usize;
        }
        rest = after;
    }
    bytes.len() - rest.len() + rest.iter().position(|byte| is_escaped(*byte)).unwrap_or(rest.len())
}

pub fn has_nul(text: &str) -> bool {
    text.as_bytes().contains(&0)
}

/// Return text with U+FFFD for each NUL, and whether it had any.
pub fn repair(text: &str) -> (Cow<'_, str>, bool) {
    if has_nul(text) { (Cow::Owned(text.replace('\0', REPLACEMENT)), true) } else { (Cow::Borrowed(text), false) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spelled(value: &Value<'_>, sorted: bool) -> (String, u32) {
        let mut out = Vec::new();
        let mut json = Json::new(&mut out);
        json.sorted = sorted;
        json.value(value);
        let anomalies = json.anomalies;
        (String::from_utf8_lossy(&out).into_owned(), anomalies)
    }

    #[test]
    fn text_is_escaped_as_python_escapes_it() {
        let text = "a\"b\\c\n\r\t\u{c}\u{8}\u{1}\u{1f}\u{7f}ü\u{2028}😀 and a long plain tail with one \" in it";
        let expected =
            "\"a\\\"b\\\\c\\n\\r\\t\\f\\b\\u0001\\u001f\u{7f}ü\u{2028}😀 and a long plain tail with one \\\" in it\"";
        assert_eq!(spelled(&Value::Text(text), false), (expected.to_owned(), 0));
    }

    #[test]
    fn the_first_byte_to_escape_is_found_wherever_it_stands() {
        let plain = b"\x80!#[]\x7f\xff a\x80!#[]\x7f\xff a\xa2";
        for byte in 0..=255 {
            for place in 0..plain.len() {
                let bytes = [plain.get(..place).unwrap_or_default(), &[byte], plain.get(place..).unwrap_or_default()];
                let expected = if is_escaped(byte) { place } else { plain.len() + 1 };
                assert_eq!(plain_prefix(&bytes.concat()), expected, "{bytes:?}");
            }
        }
    }

    #[test]
    fn values_are_normalised_and_what_that_took_is_noted() {
        let tree = Value::Array(vec![
            Value::Text("a\0b"),
            Value::Double(f64::NAN),
            Value::Double(f64::NEG_INFINITY),
            Value::Bytes(b"\xff\0"),
            Value::Int(i64::MIN),
            Value::Null,
            Value::Bool(true),
        ]);
        let expected = "[\"a\u{fffd}b\",\"NaN\",\"-Infinity\",\"/wA=\",-9223372036854775808,null,true]";
        assert_eq!(
            spelled(&tree, false),
            (expected.to_owned(), anomaly::TEXT_REPAIRED | anomaly::NON_FINITE | anomaly::BYTES_VALUE)
        );
    }

    #[test]
    fn keys_that_become_equal_meet_and_what_was_lost_is_noted() {
        let map =
            Value::Map(vec![("b\0", Value::Double(f64::NAN)), ("a", Value::Int(1)), ("b\u{fffd}", Value::Int(2))]);
        let anomalies = anomaly::TEXT_REPAIRED | anomaly::DUPLICATE_KEY | anomaly::NON_FINITE;
        assert_eq!(spelled(&map, false), ("{\"b\u{fffd}\":2,\"a\":1}".to_owned(), anomalies));
        assert_eq!(spelled(&map, true), ("{\"a\":1,\"b\u{fffd}\":2}".to_owned(), anomalies));
    }
}
