//! AnyValue: from the wire to a tree that borrows its text, and attributes without double keys.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use crate::wire::{Content, Fields, MAX_LEVEL, Result, Unusual, once, text};

/// One AnyValue. One that is unset, or that only profiles may use, is `Null`.
#[derive(Clone, Debug, PartialEq)]
pub enum Value<'a> {
    Null,
    Bool(bool),
    Int(i64),
    Double(f64),
    Text(&'a str),
    Bytes(&'a [u8]),
    Array(Vec<Value<'a>>),
    Map(Map<'a>),
}

/// Attributes, or a kvlist: each key once, in the order of their first appearance.
pub type Map<'a> = Vec<(&'a str, Value<'a>)>;

/// Up to so many keys are compared with each other; more are hashed.
const COMPARED: usize = 16;

/// Reads values, and notes what they cost and whether a key came twice.
pub struct Reader {
    /// How many fields may still be read.
    pub allowance: usize,
    pub duplicate_key: bool,
}

impl Reader {
    /// Read one KeyValue into a map; `level` is how deep it lies in the request.
    pub fn pair<'a>(&mut self, message: &'a [u8], level: usize, map: &mut Map<'a>) -> Result<()> {
        check_level(level)?;
        let mut key = "";
        let mut value = None;
        let mut fields = Fields::new(message);
        while let Some(field) = fields.next(&mut self.allowance)? {
            match field {
                (1, Content::Delimited(content)) => key = text(content)?,
                (2, Content::Delimited(content)) => once(&mut value, content)?,
                (3, Content::Varint(_)) => {} // an index into a profile's strings
                (1..=3, _) => return Err(Unusual),
                _ => {}
            }
        }
        map.push((key, Value::Null));
        match (value, map.last_mut()) {
            (Some(message), Some((_, place))) => self.value(message, level + 1, place),
            _ => Ok(()),
        }
    }

    /// Read an AnyValue into its place, which holds `Null`.
    ///
    /// In place because a `Value` that is handed up was written in parts and is read as a whole, for which the CPU has
    /// to wait: a tenth of the time that a span took.
    pub fn value<'a>(&mut self, message: &'a [u8], level: usize, place: &mut Value<'a>) -> Result<()> {
        check_level(level)?;
        let mut found = false;
        let mut fields = Fields::new(message);
        while let Some(field) = fields.next(&mut self.allowance)? {
            match field {
                (1, Content::Delimited(content)) => *place = Value::Text(text(content)?),
                (2, Content::Varint(number)) => *place = Value::Bool(number != 0),
                (3, Content::Varint(number)) => *place = Value::Int(number as i64),
                (4, Content::Fixed64(bits)) => *place = Value::Double(f64::from_bits(bits)),
                (5, Content::Delimited(content)) => *place = self.array(content, level + 1)?,
                (6, Content::Delimited(content)) => *place = self.kvlist(content, level + 1)?,
                (7, Content::Delimited(content)) => *place = Value::Bytes(content),
                (8, Content::Varint(_)) => {} // an index into a profile's strings
                (1..=8, _) => return Err(Unusual),
                _ => continue,
            }
            // The last of several wins, and two lists are merged: rare enough to leave it to the reference.
            if std::mem::replace(&mut found, true) {
                return Err(Unusual);
            }
        }
        Ok(())
    }

    fn array<'a>(&mut self, message: &'a [u8], level: usize) -> Result<Value<'a>> {
        check_level(level)?;
        let mut values = Vec::new();
        let mut fields = Fields::new(message);
        while let Some(field) = fields.next(&mut self.allowance)? {
            match field {
                (1, Content::Delimited(content)) => {
                    let mut value = Value::Null;
                    self.value(content, level + 1, &mut value)?;
                    values.push(value);
                }
                (1, _) => return Err(Unusual),
                _ => {}
            }
        }
        Ok(Value::Array(values))
    }

    fn kvlist<'a>(&mut self, message: &'a [u8], level: usize) -> Result<Value<'a>> {
        check_level(level)?;
        let mut map = Map::new();
        let mut fields = Fields::new(message);
        while let Some(field) = fields.next(&mut self.allowance)? {
            match field {
                (1, Content::Delimited(content)) => self.pair(content, level + 1, &mut map)?,
                (1, _) => return Err(Unusual),
                _ => {}
            }
        }
        self.finish(&mut map);
        Ok(Value::Map(map))
    }

    /// Let the last of equal keys win, in the place of the first.
    pub fn finish(&mut self, map: &mut Map<'_>) {
        self.duplicate_key |= deduplicate(map);
    }
}

fn check_level(level: usize) -> Result<()> {
    if level > MAX_LEVEL { Err(Unusual) } else { Ok(()) }
}

fn deduplicate(map: &mut Map<'_>) -> bool {
    if map.len() <= COMPARED && !has_equal_keys(map) {
        return false;
    }
    let before = map.len();
    let mut places = HashMap::with_capacity(before);
    let mut kept: Map = Vec::with_capacity(before);
    for (key, value) in map.drain(..) {
        match places.entry(key) {
            Entry::Vacant(place) => {
                place.insert(kept.len());
                kept.push((key, value));
            }
            Entry::Occupied(place) => {
                if let Some(first) = kept.get_mut(*place.get()) {
                    first.1 = value;
                }
            }
        }
    }
    *map = kept;
    map.len() < before
}

fn has_equal_keys(map: &Map<'_>) -> bool {
    map.iter().enumerate().any(|(index, (key, _))| map.iter().skip(index + 1).any(|(other, _)| key == other))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_of_equal_keys_wins_in_the_place_of_the_first() {
        for size in [3, 40] {
            let mut map: Map = vec![("a", Value::Int(1)), ("b", Value::Int(2)), ("a", Value::Int(3))];
            let names: Vec<String> = (3..size).map(|number| format!("k{number}")).collect();
            map.extend(names.iter().map(|name| (name.as_str(), Value::Null)));
            assert!(deduplicate(&mut map));
            assert_eq!(map.first(), Some(&("a", Value::Int(3))));
            assert_eq!(map.get(1), Some(&("b", Value::Int(2))));
            assert_eq!(map.len(), size - 1);
            assert!(!deduplicate(&mut map));
        }
    }

    #[test]
    fn nesting_ends_at_protobufs_limit() {
        let mut message = b"\x18\x07".to_vec();
        for _ in 0..40 {
            let mut wrapped = Vec::new();
            for number in [0x0a, 0x2a] {
                wrapped = vec![number];
                let mut length = message.len();
                while length > 0x7f {
                    wrapped.push((length & 0x7f) as u8 | 0x80);
                    length >>= 7;
                }
                wrapped.push(length as u8);
                wrapped.extend_from_slice(&message);
                message = wrapped.clone();
            }
            message = wrapped;
        }
        let mut reader = Reader { allowance: 1000, duplicate_key: false };
        assert!(reader.value(&message, 20, &mut Value::Null).is_ok());
        assert_eq!(reader.value(&message, 21, &mut Value::Null), Err(Unusual));
    }
}
