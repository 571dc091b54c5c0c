//! What nodes send each other: frames of a kind, a length and a body. Each kind has a bound, and a body takes memory as it
//! arrives, so nothing that comes over the network makes a node take more than that.

use std::io::{Error, ErrorKind, Read, Result, Write};

/// Bytes before a body: the kind, and the body's length as 4 bytes, the lowest first, as all numbers.
const HEAD_BYTES: usize = 5;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A node says who it is and how it was started.
    Hello,
    /// Node 0 has all nodes together.
    Welcome,
    /// Node 0 says why it does not take a node.
    Refused,
    /// The sender lives.
    Alive,
    /// What a rank gives to a collective of host devices.
    Give,
    /// What a node says at a meeting of all nodes, to node 0.
    Meet,
    /// What all nodes said, from node 0.
    Met,
    /// What the other nodes shall do, from node 0.
    Command,
    /// A rank is lost.
    Lost,
    /// The sender leaves.
    Bye,
}

/// Every kind and the most bytes of its body; the first byte of a frame is its place here and [`FIRST_KIND`].
const KINDS: &[(Kind, usize)] = &[
    (Kind::Hello, 64 << 10),
    (Kind::Welcome, 0),
    (Kind::Refused, 64 << 10),
    (Kind::Alive, 0),
    (Kind::Give, 256 << 20),
    (Kind::Meet, 1 << 20),
    (Kind::Met, 16 << 20),
    (Kind::Command, 64 << 20),
    (Kind::Lost, 64 << 10),
    (Kind::Bye, 0),
];

/// No text and no TLS begins with it or with what follows it.
const FIRST_KIND: u8 = 0xb0;

impl Kind {
    /// The most bytes of a body of this kind.
    pub(super) fn bytes_max(self) -> usize {
        KINDS.iter().find(|(kind, _)| *kind == self).map_or(0, |(_, bytes)| *bytes)
    }

    fn byte(self) -> u8 {
        FIRST_KIND + KINDS.iter().position(|(kind, _)| *kind == self).unwrap_or(0) as u8
    }

    fn of(byte: u8) -> Option<Self> {
        byte.checked_sub(FIRST_KIND).and_then(|at| KINDS.get(usize::from(at))).map(|(kind, _)| *kind)
    }
}

/// Writes a frame whose body is these parts, one after the other.
///
/// # Errors
/// The stream's; [`ErrorKind::InvalidInput`] for a body above the bound of its kind.
pub(super) fn send(stream: &mut impl Write, kind: Kind, parts: &[&[u8]]) -> Result<()> {
    let len = parts.iter().map(|part| part.len()).sum::<usize>();
    if len > kind.bytes_max() {
        let message = format!("{len} bytes of {kind:?} for another node; at most {} are sent", kind.bytes_max());
        return Err(Error::new(ErrorKind::InvalidInput, message));
    }
    let mut frame = Vec::with_capacity(HEAD_BYTES + len);
    frame.push(kind.byte());
    frame.extend_from_slice(&(len as u32).to_le_bytes());
    parts.iter().for_each(|part| frame.extend_from_slice(part));
    stream.write_all(&frame)
}

/// Reads a frame.
///
/// # Errors
/// The stream's, [`ErrorKind::UnexpectedEof`] at its end; [`ErrorKind::InvalidData`] for what is no frame.
pub(super) fn receive(stream: &mut impl Read) -> Result<(Kind, Vec<u8>)> {
    let mut head = [0; HEAD_BYTES];
    stream.read_exact(&mut head)?;
    let [first, len @ ..] = head;
    let len = u32::from_le_bytes(len) as usize;
    let invalid = |message: String| Error::new(ErrorKind::InvalidData, message);
    let kind = Kind::of(first).ok_or_else(|| invalid(format!("what begins with {head:02x?} is no frame of a node")))?;
    if len > kind.bytes_max() {
        return Err(invalid(format!("{len} bytes of {kind:?}; at most {} are taken", kind.bytes_max())));
    }
    let mut body = Vec::new();
    stream.take(len as u64).read_to_end(&mut body)?;
    if body.len() < len {
        return Err(Error::new(ErrorKind::UnexpectedEof, format!("{} of {len} bytes of {kind:?}", body.len())));
    }
    Ok((kind, body))
}

/// Puts the values of a body together.
#[derive(Debug, Default)]
pub(super) struct Writer(pub(super) Vec<u8>);

impl Writer {
    pub(super) fn u32(mut self, number: u32) -> Self {
        self.0.extend_from_slice(&number.to_le_bytes());
        self
    }

    /// Bytes with their length before them.
    pub(super) fn bytes(self, bytes: &[u8]) -> Self {
        let mut this = self.u32(bytes.len() as u32);
        this.0.extend_from_slice(bytes);
        this
    }

    /// A text, of which `bytes_max` bytes are kept.
    pub(super) fn text(self, text: &str, bytes_max: usize) -> Self {
        self.bytes(&text.as_bytes()[..text.floor_char_boundary(bytes_max)])
    }
}

/// Takes the values of a body; each is `None` if the body does not have it.
#[derive(Debug)]
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn u32(&mut self) -> Option<u32> {
        let (number, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u32::from_le_bytes(*number))
    }

    pub(super) fn bytes(&mut self) -> Option<&'a [u8]> {
        let len = self.u32()? as usize;
        let (bytes, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(bytes)
    }

    pub(super) fn text(&mut self) -> Option<String> {
        self.bytes().map(|bytes| String::from_utf8_lossy(bytes).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_frame_above_its_bound_is_neither_sent_nor_taken() {
        let error = send(&mut Vec::new(), Kind::Alive, &[b"x"]).unwrap_err().to_string();
        assert!(error.contains("at most 0"), "{error}");
        let mut head = vec![Kind::Give.byte()];
        head.extend_from_slice(&u32::MAX.to_le_bytes());
        let error = receive(&mut head.as_slice()).unwrap_err().to_string();
        assert!(error.contains("4294967295 bytes of Give"), "{error}");
        let error = receive(&mut "GET / HTTP/1.1\r\n".as_bytes()).unwrap_err().to_string();
        assert!(error.contains("no frame of a node"), "{error}");
    }

    proptest! {
        #[test]
        fn what_is_sent_is_received(at in 0..KINDS.len(), body: Vec<u8>, number: u32, text: String) {
            let kind = KINDS[at].0;
            let body = Writer::default().u32(number).text(&text, 16).bytes(&body).0;
            let body = &body[..body.len().min(kind.bytes_max())];
            let mut sent = Vec::new();
            send(&mut sent, kind, &[&body[..body.len() / 2], &body[body.len() / 2..]]).unwrap();
            prop_assert_eq!(receive(&mut sent.as_slice()).unwrap(), (kind, body.to_vec()));
            let cut = receive(&mut &sent[..sent.len() - 1]).unwrap_err();
            prop_assert_eq!(cut.kind(), ErrorKind::UnexpectedEof);
            if kind.bytes_max() > 0 {
                let mut reader = Reader(body);
                prop_assert_eq!(reader.u32(), Some(number));
                let kept = reader.text().unwrap();
                prop_assert!(kept.len() <= 16 && text.starts_with(&kept));
            }
        }

        #[test]
        fn garbage_is_an_error_or_a_frame_within_bounds(bytes: Vec<u8>) {
            if let Ok((kind, body)) = receive(&mut bytes.as_slice()) {
                prop_assert!(body.len() <= kind.bytes_max());
                let mut reader = Reader(&body);
                while reader.text().is_some() {}
            }
        }
    }
}
