//! Requests merged into one batch: their rows as one sequence, in key order, and gathered into one COPY.

use std::sync::Arc;

use crate::packed::Packed;

const PREFIX: usize = 16;

/// Parts that follow one another as if they were one; they are shared, not copied.
#[derive(Clone, Debug)]
pub struct Joined<T> {
    parts: Vec<(usize, Arc<T>)>, // each with the position of its first element
    len: usize,
}

impl<T> Joined<T> {
    pub fn new(parts: impl IntoIterator<Item = Arc<T>>, len_of: impl Fn(&T) -> usize) -> Self {
        let mut len = 0;
        let mut placed = Vec::new();
        for part in parts {
            let size = len_of(&part);
            if size > 0 {
                placed.push((len, part));
                len += size;
            }
        }
        Self { parts: placed, len }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn parts(&self) -> impl Iterator<Item = &Arc<T>> {
        self.parts.iter().map(|(_, part)| part)
    }

    /// Find the part in which an element lies, and its position there.
    #[inline]
    pub fn find(&self, index: usize) -> Option<(&T, usize)> {
        let after = self.parts.partition_point(|(first, _)| *first <= index);
        let (first, part) = self.parts.get(after.checked_sub(1)?)?;
        Some((part, index - first))
    }
}

impl Joined<Packed> {
    pub fn get(&self, index: usize) -> Option<&[u8]> {
        let (part, index) = self.find(index)?;
        part.get(index)
    }

    /// How many of these rows make a piece of at most `bytes` bytes, and how many bytes they have; one row always does.
    pub fn piece(&self, rows: &[usize], bytes: usize) -> (usize, usize) {
        let mut size = 0;
        for (count, row) in rows.iter().enumerate() {
            let more = self.get(*row).map_or(0, <[u8]>::len);
            if count > 0 && size + more > bytes {
                return (count, size);
            }
            size += more;
        }
        (rows.len(), size)
    }

    /// Write rows into a buffer of their size.
    pub fn gather(&self, rows: &[usize], buffer: &mut [u8]) {
        let mut rest = buffer;
        for row in rows.iter().filter_map(|row| self.get(*row)) {
            let Some((place, after)) = rest.split_at_mut_checked(row.len()) else { return };
            place.copy_from_slice(row);
            rest = after;
        }
    }

    /// Put keys in order.
    pub fn order(&self) -> Order {
        let mut entries: Vec<(u128, &[u8], usize)> = Vec::with_capacity(self.len);
        let keys = self.parts.iter().flat_map(|(_, part)| part.iter());
        entries.extend(keys.enumerate().map(|(index, key)| (prefix(key), key, index)));
        entries.sort_unstable();
        let mut order = Order { survivors: Vec::with_capacity(self.len), doubles: Vec::new() };
        let mut last: Option<&[u8]> = None;
        for (_, key, index) in entries {
            if last == Some(key) {
                order.double(index);
            } else {
                order.survivors.push(index);
                last = Some(key);
            }
        }
        order
    }
}

/// The first bytes of a key as a number that sorts alike: it decides almost every comparison.
fn prefix(key: &[u8]) -> u128 {
    let mut bytes = [0; PREFIX];
    for (place, byte) in bytes.iter_mut().zip(key) {
        *place = *byte;
    }
    u128::from_be_bytes(bytes)
}

/// One row a key, in key order, and which other rows have its key.
#[derive(Debug, PartialEq, Eq)]
pub struct Order {
    pub survivors: Vec<usize>,
    pub doubles: Vec<(usize, Vec<usize>)>,
}

impl Order {
    fn double(&mut self, index: usize) {
        let Some(&survivor) = self.survivors.last() else { return };
        match self.doubles.last_mut() {
            Some((of, others)) if *of == survivor => others.push(index),
            _ => self.doubles.push((survivor, vec![index])),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn joined(parts: &[&[&str]]) -> Joined<Packed> {
        let packed = |part: &&[&str]| {
            let mut packed = Packed::default();
            part.iter().for_each(|each| packed.push(each.as_bytes()));
            Arc::new(packed)
        };
        Joined::new(parts.iter().map(packed), Packed::len)
    }

    #[test]
    fn keys_are_put_in_order_and_doubles_stay_with_the_first() {
        let keys = joined(&[&["b", "a", "b"], &[], &["", "b", "a long key with a tail 1", "a long key with a tail 0"]]);
        let order = keys.order();
        assert_eq!(order.survivors, [3, 1, 6, 5, 0]);
        assert_eq!(order.doubles, [(0, vec![2, 4])]);
    }

    #[test]
    fn a_prefix_is_no_key() {
        let keys = joined(&[&["a\0", "a"]]);
        assert_eq!(keys.order().survivors, [1, 0]);
    }

    #[test]
    fn rows_are_gathered_in_pieces() {
        let rows = joined(&[&["one"], &["two", "three"]]);
        assert_eq!(rows.piece(&[2, 0, 1], 4), (1, 5));
        assert_eq!(rows.piece(&[0, 1, 2], 5), (1, 3));
        assert_eq!(rows.piece(&[0, 1, 2], 6), (2, 6));
        assert_eq!(rows.piece(&[], 4), (0, 0));
        let mut buffer = vec![0; 8];
        rows.gather(&[2, 0], &mut buffer);
        assert_eq!(buffer, b"threeone");
        assert_eq!((rows.get(1), rows.get(3)), (Some(&b"two"[..]), None));
    }
}
