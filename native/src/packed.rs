//! Many byte strings in one buffer: rows, keys, or the fields of one row.

use std::ops::Range;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Packed {
    data: Vec<u8>,
    ends: Vec<usize>,
}

impl Packed {
    pub fn with_capacity(bytes: usize) -> Self {
        Self { data: Vec::with_capacity(bytes), ends: Vec::new() }
    }

    pub fn len(&self) -> usize {
        self.ends.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// How many bytes all have together.
    pub fn total(&self) -> usize {
        self.ends.last().copied().unwrap_or(0)
    }

    pub fn clear(&mut self) {
        self.data.clear();
        self.ends.clear();
    }

    #[inline]
    pub fn get(&self, index: usize) -> Option<&[u8]> {
        self.run(index..index.checked_add(1)?)
    }

    /// Byte strings that follow one another, behind one another.
    #[inline]
    pub fn run(&self, indices: Range<usize>) -> Option<&[u8]> {
        let end_of = |count: usize| if count == 0 { Some(0) } else { self.ends.get(count - 1).copied() };
        self.data.get(end_of(indices.start)?..end_of(indices.end)?)
    }

    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        (0..self.len()).filter_map(|index| self.get(index))
    }

    /// Append a byte string.
    #[inline]
    pub fn push(&mut self, bytes: &[u8]) {
        self.data.extend_from_slice(bytes);
        self.close();
    }

    /// The buffer, to append the next byte string to in pieces; [`Packed::close`] ends it.
    #[inline]
    pub fn open(&mut self) -> &mut Vec<u8> {
        &mut self.data
    }

    #[inline]
    pub fn close(&mut self) {
        self.ends.push(self.data.len());
    }

    /// Forget the byte string at `index` and all after it; the next one takes its place.
    pub fn reopen(&mut self, index: usize) {
        self.ends.truncate(index);
        self.data.truncate(self.total());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_strings_come_back_as_they_went_in() {
        let mut packed = Packed::default();
        packed.push(b"one");
        packed.push(b"");
        packed.push(b"gone");
        packed.reopen(2);
        packed.push(b"three");
        assert_eq!(packed.iter().collect::<Vec<_>>(), [&b"one"[..], b"", b"three"]);
        assert_eq!((packed.len(), packed.total(), packed.get(3)), (3, 8, None));
        assert_eq!([packed.run(0..2), packed.run(1..3), packed.run(2..4)], [Some(&b"one"[..]), Some(b"three"), None]);
    }
}
