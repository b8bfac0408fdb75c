//! protobuf's wire format: the fields of a message, one after the other, borrowed from the request's bytes.
//!
//! Stricter than protobuf wherever its leniency needs thought: groups, overlong tags and lengths, values beyond
//! 64 bits. Those are rare, and the reference knows what they mean.

/// What this core leaves to the reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unusual;

pub type Result<T> = std::result::Result<T, Unusual>;

/// How deep protobuf lets messages nest, counted from the request.
pub const MAX_LEVEL: usize = 100;

/// A field's value, as it stands on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content<'a> {
    Varint(u64),
    Fixed64(u64),
    Delimited(&'a [u8]),
    Fixed32(u32),
}

/// The fields of a message that are still to be read.
#[derive(Clone, Copy)]
pub struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    pub fn new(message: &'a [u8]) -> Self {
        Self { rest: message }
    }

    /// Read the next field's number and value; `None` at the message's end. Each field costs one of `allowance`.
    #[inline(always)]
    #[expect(clippy::inline_always, reason = "a call would pass each field through memory: a fifth of a span's time")]
    pub fn next(&mut self, allowance: &mut usize) -> Result<Option<(u32, Content<'a>)>> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        *allowance = allowance.checked_sub(1).ok_or(Unusual)?;
        let tag = self.short_varint()?;
        let number = tag >> 3;
        if number == 0 {
            return Err(Unusual);
        }
        let content = match tag & 7 {
            0 => Content::Varint(self.varint()?),
            1 => Content::Fixed64(u64::from_le_bytes(self.array()?)),
            2 => {
                let length = self.short_varint()? as usize;
                let (content, rest) = self.rest.split_at_checked(length).ok_or(Unusual)?;
                self.rest = rest;
                Content::Delimited(content)
            }
            5 => Content::Fixed32(u32::from_le_bytes(self.array()?)),
            _ => return Err(Unusual),
        };
        Ok(Some((number, content)))
    }

    /// Read a tag or a length: at most four bytes, which is more than any that occurs.
    #[inline]
    fn short_varint(&mut self) -> Result<u32> {
        let (&first, mut rest) = self.rest.split_first().ok_or(Unusual)?;
        let mut value = u32::from(first & 0x7f);
        let mut byte = first;
        let mut shift = 0;
        while byte >= 0x80 {
            shift += 7;
            let (&next, after) = rest.split_first().ok_or(Unusual)?;
            if shift > 21 {
                return Err(Unusual);
            }
            value |= u32::from(next & 0x7f) << shift;
            byte = next;
            rest = after;
        }
        self.rest = rest;
        Ok(value)
    }

    fn varint(&mut self) -> Result<u64> {
        let mut value = 0u64;
        let mut rest = self.rest;
        for shift in (0..70).step_by(7) {
            let (&byte, after) = rest.split_first().ok_or(Unusual)?;
            rest = after;
            if shift == 63 && byte > 1 {
                return Err(Unusual);
            }
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                self.rest = rest;
                return Ok(value);
            }
        }
        Err(Unusual)
    }

    #[inline]
    fn array<const SIZE: usize>(&mut self) -> Result<[u8; SIZE]> {
        let (&bytes, rest) = self.rest.split_first_chunk().ok_or(Unusual)?;
        self.rest = rest;
        Ok(bytes)
    }
}

/// Read a string field.
#[inline]
pub fn text(content: &[u8]) -> Result<&str> {
    std::str::from_utf8(content).map_err(|_| Unusual)
}

/// Note a message field that may come only once: what comes twice is merged, by the reference.
pub fn once<'a>(place: &mut Option<&'a [u8]>, message: &'a [u8]) -> Result<()> {
    match place.replace(message) {
        None => Ok(()),
        Some(_) => Err(Unusual),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(message: &[u8]) -> Result<Vec<(u32, Content<'_>)>> {
        let mut fields = Fields::new(message);
        let mut found = Vec::new();
        while let Some(field) = fields.next(&mut 100)? {
            found.push(field);
        }
        Ok(found)
    }

    #[test]
    fn fields_of_every_wire_type_are_read() {
        let message = b"\x08\x96\x01\x11\x01\0\0\0\0\0\0\0\x1a\x02hi\x25\x02\0\0\0\x82\x01\0";
        let expected = vec![
            (1, Content::Varint(150)),
            (2, Content::Fixed64(1)),
            (3, Content::Delimited(b"hi")),
            (4, Content::Fixed32(2)),
            (16, Content::Delimited(b"")),
        ];
        assert_eq!(all(message), Ok(expected));
    }

    #[test]
    fn the_greatest_number_is_read_and_a_greater_one_is_not() {
        assert_eq!(all(b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"), Ok(vec![(1, Content::Varint(u64::MAX))]));
        assert_eq!(all(b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02"), Err(Unusual));
    }

    #[test]
    fn what_is_cut_off_or_odd_is_left_to_the_reference() {
        for message in [
            &b"\x08"[..],
            b"\x08\x80",
            b"\x11\0",
            b"\x1a\x03hi",
            b"\x25\0",
            b"\x80",
            b"\0\0",
            b"\x0b\x0c",
            b"\x0c",
            b"\x0e",
            b"\x8a\x80\x80\x80\0\0",
            b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
        ] {
            assert_eq!(all(message), Err(Unusual), "{message:?}");
        }
    }

    #[test]
    fn an_allowance_ends() {
        assert_eq!(Fields::new(b"\x08\x01").next(&mut 0), Err(Unusual));
    }
}
