//! A cursor that never goes past the end.

use std::ops::Range;

use super::Malformed;

pub(super) struct Reader<'a> {
    data: &'a [u8],
    position: usize,
}

impl<'a> Reader<'a> {
    pub fn new(data: &'a [u8]) -> Self {
        Self { data, position: 0 }
    }

    pub fn position(&self) -> usize {
        self.position
    }

    fn left(&self) -> u64 {
        (self.data.len() - self.position) as u64
    }

    /// The next `count` bytes.
    pub fn take(&mut self, count: u64) -> Result<&'a [u8], Malformed> {
        let left = self.left();
        if count > left {
            return Err(Malformed(format!(
                "the file ends too early: {count} bytes are expected at byte {}, {left} are left",
                self.position
            )));
        }
        let start = self.position;
        self.position += count as usize;
        Ok(&self.data[start..self.position])
    }

    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64)?);
        Ok(out)
    }

    pub fn u32(&mut self) -> Result<u32, Malformed> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub fn u64(&mut self) -> Result<u64, Malformed> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A count of things that take at least `each` bytes of what is left.
    pub fn count(&mut self, what: &str, max: u64, each: u64) -> Result<u64, Malformed> {
        let count = self.u64()?;
        let fits = self.left() / each;
        if count > max {
            return Err(Malformed(format!("the file claims {count} {what}; at most {max} are read")));
        }
        if count > fits {
            return Err(Malformed(format!("the file claims {count} {what}; at most {fits} fit in what is left of it")));
        }
        Ok(count)
    }

    /// A text with its length before it.
    pub fn text(&mut self, bytes_max: u64) -> Result<Range<usize>, Malformed> {
        let bytes = self.u64()?;
        if bytes > bytes_max {
            return Err(Malformed(format!("the file claims a text of {bytes} bytes; at most {bytes_max} are read")));
        }
        let start = self.position;
        self.take(bytes)?;
        Ok(start..self.position)
    }

    /// A text that is kept.
    pub fn name(&mut self, what: &str, bytes_max: u64) -> Result<String, Malformed> {
        let span = self.text(bytes_max)?;
        let text = std::str::from_utf8(self.slice(span)).map_err(|_| Malformed(format!("{what} is not UTF-8")))?;
        Ok(text.to_owned())
    }

    pub fn slice(&self, span: Range<usize>) -> &'a [u8] {
        &self.data[span]
    }
}
