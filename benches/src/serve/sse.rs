//! Server-sent events, cut at any byte.

use std::mem::take;

/// Puts the bytes of a stream together to events.
#[derive(Debug, Default)]
pub(super) struct Parser {
    /// The line that has not ended.
    line: Vec<u8>,
    /// The data lines of the event that has not ended.
    data: Option<Vec<u8>>,
}

impl Parser {
    /// Takes the next bytes and hands each event that they end to `event`: its data, lines joined by a line feed.
    pub(super) fn feed(&mut self, mut bytes: &[u8], mut event: impl FnMut(&[u8])) {
        while let Some(end) = bytes.iter().position(|&byte| byte == b'\n') {
            self.line.extend_from_slice(&bytes[..end]);
            bytes = &bytes[end + 1..];
            let line = take(&mut self.line);
            self.end_line(line.strip_suffix(b"\r").unwrap_or(&line), &mut event);
            // Its memory serves the next line.
            self.line = line;
            self.line.clear();
        }
        self.line.extend_from_slice(bytes);
    }

    fn end_line(&mut self, line: &[u8], event: &mut impl FnMut(&[u8])) {
        if line.is_empty() {
            if let Some(data) = self.data.take() {
                event(&data);
            }
        } else if let Some(value) = line.strip_prefix(b"data:") {
            let value = value.strip_prefix(b" ").unwrap_or(value);
            match &mut self.data {
                None => self.data = Some(value.to_vec()),
                Some(data) => {
                    data.push(b'\n');
                    data.extend_from_slice(value);
                }
            }
        }
        // Comments and the other fields (event, id, retry) say nothing about the answer.
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &str = ": hello\n\ndata: {\"a\": 1}\n\nevent: x\r\ndata: one\r\ndata:two\r\n\r\ndata: \u{e9}\n\nid: 7\n\n\
                          data: [DONE]\n\ndata: never ended";

    #[test]
    fn events_are_whole_wherever_the_stream_is_cut() {
        let expected = ["{\"a\": 1}", "one\ntwo", "\u{e9}", "[DONE]"];
        for piece in 1..=STREAM.len() {
            let (mut parser, mut events) = (Parser::default(), Vec::new());
            for bytes in STREAM.as_bytes().chunks(piece) {
                parser.feed(bytes, |data| events.push(String::from_utf8(data.to_vec()).expect("UTF-8")));
            }
            assert_eq!(events, expected, "in pieces of {piece}");
        }
    }
}
