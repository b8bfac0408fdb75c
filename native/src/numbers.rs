//! Doubles, spelled as Python spells them: the shortest digits that read back as the same double.

/// Append a finite double, as Python's `repr` has it.
pub fn double(value: f64, out: &mut Vec<u8>) {
    let mut buffer = zmij::Buffer::new();
    let spelled = buffer.format_finite(value).as_bytes();
    let unsigned = if let Some(unsigned) = spelled.strip_prefix(b"-") {
        out.push(b'-');
        unsigned
    } else {
        spelled
    };
    let (mantissa, exponent) = match unsigned.iter().position(|byte| *byte == b'e') {
        Some(place) => {
            let (mantissa, exponent) = unsigned.split_at(place);
            (mantissa, integer(exponent.get(1..).unwrap_or_default()))
        }
        None => (unsigned, 0),
    };
    let whole = mantissa.iter().position(|byte| *byte == b'.').unwrap_or(mantissa.len());
    let mut digits = [0u8; 32];
    let mut count = 0;
    for (place, &byte) in digits.iter_mut().zip(mantissa.iter().filter(|byte| **byte != b'.')) {
        *place = byte;
        count += 1;
    }
    let digits = digits.get(..count).unwrap_or_default();
    // Zeros on either side are no digits: "0.00012" and "1200.0" have two.
    let leading = digits.iter().take_while(|digit| **digit == b'0').count();
    let digits = digits.get(leading..).unwrap_or_default();
    let trailing = digits.iter().rev().take_while(|digit| **digit == b'0').count();
    let digits = digits.get(..digits.len() - trailing).unwrap_or_default();
    if digits.is_empty() {
        out.extend_from_slice(b"0.0");
    } else {
        // The value is 0.DIGITS times ten to the power of `point`.
        write(digits, whole as i32 - leading as i32 + exponent, out);
    }
}

fn write(digits: &[u8], point: i32, out: &mut Vec<u8>) {
    if point <= -4 || point > 16 {
        let (first, others) = digits.split_at(1);
        out.extend_from_slice(first);
        if !others.is_empty() {
            out.push(b'.');
            out.extend_from_slice(others);
        }
        out.push(b'e');
        out.push(if point > 0 { b'+' } else { b'-' });
        let exponent = (point - 1).unsigned_abs();
        if exponent < 10 {
            out.push(b'0');
        }
        out.extend_from_slice(itoa::Buffer::new().format(exponent).as_bytes());
    } else if point <= 0 {
        out.extend_from_slice(b"0.");
        out.resize(out.len() + point.unsigned_abs() as usize, b'0');
        out.extend_from_slice(digits);
    } else if (point as usize) < digits.len() {
        let (before, after) = digits.split_at(point as usize);
        out.extend_from_slice(before);
        out.push(b'.');
        out.extend_from_slice(after);
    } else {
        out.extend_from_slice(digits);
        out.resize(out.len() + (point as usize).saturating_sub(digits.len()), b'0');
        out.extend_from_slice(b".0");
    }
}

fn integer(spelled: &[u8]) -> i32 {
    std::str::from_utf8(spelled).ok().and_then(|text| text.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    #[test]
    fn doubles_are_spelled_as_python_spells_them() {
        for (value, expected) in [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (-1.5, "-1.5"),
            (0.1, "0.1"),
            (0.0001, "0.0001"),
            (0.000_123, "0.000123"),
            (0.000_01, "1e-05"),
            (1.25e-7, "1.25e-07"),
            (5e-324, "5e-324"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.2e16, "1.2e+16"),
            (9_999_999_999_999_998.0, "9999999999999998.0"),
            (123_456_789_012_345_680.0, "1.2345678901234568e+17"),
            (1e22, "1e+22"),
            (1e23, "1e+23"),
            (1e100, "1e+100"),
            (f64::MAX, "1.7976931348623157e+308"),
            (f64::MIN_POSITIVE, "2.2250738585072014e-308"),
        ] {
            let mut out = Vec::new();
            super::double(value, &mut out);
            assert_eq!(String::from_utf8_lossy(&out), expected);
        }
    }

    #[test]
    fn every_double_reads_back() {
        let mut bits = 0x1234_5678_9abc_def1_u64;
        for _ in 0..200_000 {
            bits = bits.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let value = f64::from_bits(bits);
            if value.is_finite() {
                let mut out = Vec::new();
                super::double(value, &mut out);
                let spelled = String::from_utf8_lossy(&out);
                assert_eq!(spelled.parse(), Ok(value), "{spelled}");
            }
        }
    }
}
