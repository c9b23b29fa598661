//! Just enough protobuf to walk an ONNX file: the fields of one message, one after the other. Owns that a damaged
//! message ends in an error and never in a wrong position; knows no schema and copies nothing.

/// The fields of a message.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fields<'a>(&'a [u8]);

/// One field: its number and its content.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Field<'a> {
    /// A varint.
    Number(u32, u64),
    /// A string, bytes, a message or packed numbers.
    Bytes(u32, &'a [u8]),
    /// Four or eight bytes.
    Fixed(u32, &'a [u8]),
}

/// The message is cut off or not protobuf.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Damaged;

impl<'a> Fields<'a> {
    pub(crate) fn of(message: &'a [u8]) -> Self {
        Self(message)
    }

    fn read(&mut self) -> Option<Field<'a>> {
        let key = varint(&mut self.0)?;
        let number = u32::try_from(key >> 3).ok()?;
        Some(match key & 7 {
            0 => Field::Number(number, varint(&mut self.0)?),
            1 => Field::Fixed(number, self.take(8)?),
            2 => {
                let len = usize::try_from(varint(&mut self.0)?).ok()?;
                Field::Bytes(number, self.take(len)?)
            }
            5 => Field::Fixed(number, self.take(4)?),
            _ => return None,
        })
    }

    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<Field<'a>, Damaged>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.read();
        if field.is_none() {
            // No byte after damage can be trusted.
            self.0 = &[];
        }
        Some(field.ok_or(Damaged))
    }
}

/// The numbers of a packed field.
pub(crate) fn packed(mut bytes: &[u8]) -> Result<Vec<u64>, Damaged> {
    let mut numbers = Vec::new();
    while !bytes.is_empty() {
        numbers.push(varint(&mut bytes).ok_or(Damaged)?);
    }
    Ok(numbers)
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_come_one_after_the_other() {
        let message = [0x08, 0x96, 0x01, 0x12, 0x02, b'h', b'i', 0x1d, 1, 2, 3, 4];
        let fields: Result<Vec<_>, _> = Fields::of(&message).collect();
        assert_eq!(fields, Ok(vec![Field::Number(1, 150), Field::Bytes(2, b"hi"), Field::Fixed(3, &[1, 2, 3, 4])]));
    }

    #[test]
    fn a_cut_message_is_damaged_and_ends() {
        for cut in [1, 2, 4, 5, 6, 8, 11] {
            let message = [0x08, 0x96, 0x01, 0x12, 0x02, b'h', b'i', 0x1d, 1, 2, 3, 4];
            let fields: Vec<_> = Fields::of(&message[..cut]).collect();
            assert_eq!(fields.last(), Some(&Err(Damaged)), "cut after {cut} bytes");
        }
        assert_eq!(Fields::of(&[0xff; 30]).collect::<Vec<_>>(), [Err(Damaged)], "an endless number");
    }
}
