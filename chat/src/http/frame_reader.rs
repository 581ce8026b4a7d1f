//! Reads WebSocket frames, and refuses a large one at its header.
//!
//! The codec of actix-http checks a frame's size only when all of it has arrived: a client that
//! announces 16 GiB could fill the memory. Here the announced length is looked at as soon as the
//! header is there.

use actix_http::ws::{Codec, Frame, Item, ProtocolError};
use actix_web::dev::Payload;
use bytes::{Bytes, BytesMut};
use bytestring::ByteString;
use futures_util::StreamExt;
use tokio_util::codec::Decoder;

/// A message or a control frame.
#[derive(Debug, PartialEq, Eq)]
pub enum Incoming {
    /// A whole text message, in however many frames it came.
    Text(ByteString),
    /// A whole binary message.
    Binary,
    /// To be answered with the same bytes.
    Ping(Bytes),
    /// An answer to a ping.
    Pong,
    /// A part of a message that is not whole yet.
    Fragment,
    /// The client wants to close.
    Close,
}

/// Why nothing more can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadError {
    /// The connection is gone.
    Gone,
    /// A message over the limit, or in too many fragments.
    TooLarge,
    /// Text that is not UTF-8.
    InvalidText,
    /// Not WebSocket.
    Protocol,
}

/// The incoming half of a connection.
pub struct FrameReader {
    payload: Payload,
    codec: Codec,
    buffer: BytesMut,
    message: BytesMut,
    is_text: bool,
    fragments: u32,
    max_bytes: usize,
    max_fragments: u32,
}

/// A buffer larger than this is not kept between messages: most sessions are idle most of the time.
const KEEP_BYTES: usize = 4096;

impl FrameReader {
    /// Reads messages of at most `max_bytes` in at most `max_fragments` frames.
    #[must_use]
    pub fn new(payload: Payload, max_bytes: usize, max_fragments: u32) -> Self {
        Self {
            payload,
            codec: Codec::new().max_size(max_bytes),
            buffer: BytesMut::new(),
            message: BytesMut::new(),
            is_text: false,
            fragments: 0,
            max_bytes,
            max_fragments,
        }
    }

    /// The next message or control frame.
    ///
    /// # Cancel safety
    /// Safe: what has arrived stays here.
    pub async fn next(&mut self) -> Result<Incoming, ReadError> {
        loop {
            if let Some(frame) = self.decode()? {
                return self.assemble(frame);
            }
            let chunk = self
                .payload
                .next()
                .await
                .ok_or(ReadError::Gone)?
                .map_err(|_| ReadError::Gone)?;
            self.buffer.extend_from_slice(&chunk);
        }
    }

    /// Reads and forgets until the client closes or goes. After [`ReadError`] nothing is understood
    /// any more, and only its going is noticed.
    pub async fn discard(&mut self) {
        loop {
            match self.next().await {
                Ok(Incoming::Close) | Err(ReadError::Gone) => return,
                Ok(_) => {}
                Err(_) => break,
            }
        }
        self.buffer = BytesMut::new();
        while let Some(Ok(_)) = self.payload.next().await {}
    }

    fn decode(&mut self) -> Result<Option<Frame>, ReadError> {
        if announced(&self.buffer).is_some_and(|length| length > self.max_bytes as u64) {
            return Err(ReadError::TooLarge);
        }
        let frame = self.codec.decode(&mut self.buffer).map_err(|e| {
            if matches!(e, ProtocolError::Overflow) {
                ReadError::TooLarge
            } else {
                ReadError::Protocol
            }
        })?;
        if self.buffer.is_empty() && self.buffer.capacity() > KEEP_BYTES {
            self.buffer = BytesMut::new();
        }
        Ok(frame)
    }

    /// Takes a frame; gives a message once its last fragment is here.
    fn assemble(&mut self, frame: Frame) -> Result<Incoming, ReadError> {
        Ok(match frame {
            Frame::Text(text) => Incoming::Text(utf8(text)?),
            Frame::Binary(_) => Incoming::Binary,
            Frame::Ping(bytes) => Incoming::Ping(bytes),
            Frame::Pong(_) => Incoming::Pong,
            Frame::Close(_) => Incoming::Close,
            Frame::Continuation(item) => {
                let (bytes, last) = match item {
                    Item::FirstText(bytes) => (self.first(bytes, true), false),
                    Item::FirstBinary(bytes) => (self.first(bytes, false), false),
                    Item::Continue(bytes) => (bytes, false),
                    Item::Last(bytes) => (bytes, true),
                };
                self.fragments += 1;
                if self.fragments > self.max_fragments
                    || self.message.len() + bytes.len() > self.max_bytes
                {
                    return Err(ReadError::TooLarge);
                }
                self.message.extend_from_slice(&bytes);
                if !last {
                    return Ok(Incoming::Fragment);
                }
                let message = std::mem::take(&mut self.message).freeze();
                if self.is_text {
                    Incoming::Text(utf8(message)?)
                } else {
                    Incoming::Binary
                }
            }
        })
    }

    fn first(&mut self, bytes: Bytes, is_text: bool) -> Bytes {
        self.message.clear();
        self.fragments = 0;
        self.is_text = is_text;
        bytes
    }
}

fn utf8(bytes: Bytes) -> Result<ByteString, ReadError> {
    ByteString::try_from(bytes).map_err(|_| ReadError::InvalidText)
}

/// The payload length in the header of the frame that the buffer begins with (RFC 6455, 5.2), once
/// it can be read.
fn announced(buffer: &[u8]) -> Option<u64> {
    match buffer.get(1)? & 0x7f {
        126 => Some(u64::from(u16::from_be_bytes(
            buffer.get(2..4)?.try_into().ok()?,
        ))),
        127 => Some(u64::from_be_bytes(buffer.get(2..10)?.try_into().ok()?)),
        length => Some(u64::from(length)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use actix_web::error::PayloadError;
    use futures_util::stream;
    use rand::RngExt;
    use rand::rngs::StdRng;
    use rand::seq::IndexedRandom;

    /// A client's frame, masked with zeros.
    fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![first];
        match payload.len() {
            n if n < 126 => frame.push(0x80 | n as u8),
            n if n < 65_536 => {
                frame.push(0x80 | 126);
                frame.extend((n as u16).to_be_bytes());
            }
            n => {
                frame.push(0x80 | 127);
                frame.extend((n as u64).to_be_bytes());
            }
        }
        frame.extend([0; 4]);
        frame.extend(payload);
        frame
    }

    fn frames(bytes: Vec<u8>, chunk: usize) -> FrameReader {
        let chunks: Vec<Result<Bytes, PayloadError>> = bytes
            .chunks(chunk)
            .map(|chunk| Ok(Bytes::copy_from_slice(chunk)))
            .collect();
        let payload: actix_http::BoxedPayloadStream = Box::pin(stream::iter(chunks));
        FrameReader::new(Payload::from(payload), 1000, 4)
    }

    const TEXT: u8 = 0x81;
    const FIRST: u8 = 0x01;
    const MIDDLE: u8 = 0x00;
    const LAST: u8 = 0x80;

    #[actix_web::test]
    async fn messages_come_whole_however_they_are_cut() {
        let bytes = [
            frame(TEXT, b"one"),
            frame(FIRST, b"t"),
            frame(0x89, b"ping"),
            frame(MIDDLE, b"w"),
            frame(LAST, b"o"),
            frame(0x82, b"x"),
        ]
        .concat();
        for chunk in [1, 2, 7, 1000] {
            let mut frames = frames(bytes.clone(), chunk);
            assert_eq!(frames.next().await, Ok(Incoming::Text("one".into())));
            assert_eq!(frames.next().await, Ok(Incoming::Fragment));
            assert_eq!(frames.next().await, Ok(Incoming::Ping("ping".into())));
            assert_eq!(frames.next().await, Ok(Incoming::Fragment));
            assert_eq!(frames.next().await, Ok(Incoming::Text("two".into())));
            assert_eq!(frames.next().await, Ok(Incoming::Binary));
            assert_eq!(frames.next().await, Err(ReadError::Gone));
        }
    }

    #[actix_web::test]
    async fn a_frame_that_announces_too_much_is_refused_by_its_header_alone() {
        let header = [vec![TEXT, 0x80 | 127], (16u64 << 30).to_be_bytes().to_vec()].concat();
        assert_eq!(frames(header, 1).next().await, Err(ReadError::TooLarge));
        assert_eq!(
            frames(frame(TEXT, &[b'x'; 1001]), 4).next().await,
            Err(ReadError::TooLarge)
        );
        assert!(frames(frame(TEXT, &[b'x'; 1000]), 4).next().await.is_ok());
    }

    #[actix_web::test]
    async fn fragments_are_bounded_in_number_and_in_sum() {
        let many = [frame(FIRST, b"x"), frame(MIDDLE, b"x").repeat(100)].concat();
        let mut many = frames(many, 50);
        for _ in 0..4 {
            assert_eq!(many.next().await, Ok(Incoming::Fragment));
        }
        assert_eq!(many.next().await, Err(ReadError::TooLarge));
        let heavy = [frame(FIRST, &[b'x'; 600]), frame(LAST, &[b'x'; 600])].concat();
        let mut heavy = frames(heavy, 50);
        assert_eq!(heavy.next().await, Ok(Incoming::Fragment));
        assert_eq!(heavy.next().await, Err(ReadError::TooLarge));
    }

    #[actix_web::test]
    async fn broken_text_and_broken_protocol_are_told_apart() {
        assert_eq!(
            frames(frame(TEXT, &[0xff, 0xfe]), 50).next().await,
            Err(ReadError::InvalidText)
        );
        assert_eq!(
            frames(frame(LAST, b"nothing before"), 50).next().await,
            Err(ReadError::Protocol)
        );
        assert_eq!(
            frames(vec![TEXT, 3, b'a', b'b', b'c'], 50).next().await,
            Err(ReadError::Protocol)
        ); // not masked
    }

    /// What a reader of WebSocket says of bytes: messages and control frames, and how it ended.
    #[derive(Debug, PartialEq, Eq)]
    enum Said {
        Text(String),
        Binary,
        Ping(Vec<u8>),
        Pong,
        /// By a Close, or because the bytes are not WebSocket: the other implementation takes a
        /// Close with a code that does not exist for a Close, this one does not.
        Ended,
    }

    /// Bytes of a client: frames that are valid, wrong, cut and mutated.
    fn random_bytes(rng: &mut StdRng) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut open = false;
        for _ in 0..rng.random_range(1..8) {
            let length = *[0, 1, 5, 125, 126, 130, 400, 999, 1000, 1001]
                .choose(rng)
                .unwrap();
            let payload: Vec<u8> = match rng.random_range(0..8) {
                0 => (0..length).map(|_| rng.random()).collect(),
                1 => "é😀".bytes().cycle().take(length).collect(),
                _ => vec![b'x'; length],
            };
            let (fin, opcode) = match rng.random_range(0..10) {
                0..3 => (true, if open { 0 } else { 1 }),
                3..6 => (false, if open { 0 } else { 1 }),
                6 => (true, 2),
                7 => (true, 9 + rng.random_range(0..2)),
                8 => (rng.random(), rng.random_range(0..16)),
                _ => (true, 0),
            };
            open = if opcode < 8 { !fin } else { open };
            let payload = if opcode >= 8 {
                &payload[..length.min(125)]
            } else {
                &payload[..]
            };
            let mut one = frame((u8::from(fin) << 7) | opcode, payload);
            if rng.random_ratio(1, 30) {
                let at = rng.random_range(0..one.len());
                one[at] = rng.random();
            }
            bytes.extend(one);
        }
        if rng.random_ratio(1, 10) {
            bytes.truncate(rng.random_range(0..bytes.len()));
        }
        bytes
    }

    /// What tungstenite says: an implementation that shares nothing with this one.
    /// `true` beside it if it ended because of a text that is not UTF-8: it sees that in the middle
    /// of a message, this one at its end (RFC 6455, 8.1, allows both).
    fn oracle(bytes: &[u8]) -> (Vec<Said>, bool) {
        use tokio_tungstenite::tungstenite::Message;
        use tokio_tungstenite::tungstenite::error::{Error, ProtocolError as Violation};
        use tokio_tungstenite::tungstenite::protocol::{Role, WebSocket, WebSocketConfig};
        struct Wire<'a>(std::io::Cursor<&'a [u8]>);
        impl std::io::Read for Wire<'_> {
            fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
                self.0.read(buffer)
            }
        }
        impl std::io::Write for Wire<'_> {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                Ok(bytes.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let config = WebSocketConfig::default()
            .max_message_size(Some(1000))
            .max_frame_size(Some(1000));
        let wire = Wire(std::io::Cursor::new(bytes));
        let mut socket = WebSocket::from_raw_socket(wire, Role::Server, Some(config));
        let mut said = Vec::new();
        loop {
            said.push(match socket.read() {
                Ok(message) if message.is_text() => {
                    Said::Text(message.to_text().unwrap().to_owned())
                }
                Ok(message) if message.is_binary() => Said::Binary,
                Ok(message) if message.is_ping() => Said::Ping(message.into_data().to_vec()),
                Ok(message) if message.is_pong() => Said::Pong,
                Ok(Message::Close(_)) => {
                    said.push(Said::Ended);
                    return (said, false);
                }
                Ok(other) => panic!("{other:?}"),
                Err(Error::Protocol(Violation::ResetWithoutClosingHandshake) | Error::Io(_)) => {
                    return (said, false);
                }
                Err(e) => {
                    said.push(Said::Ended);
                    return (said, matches!(e, Error::Utf8(_)));
                }
            });
        }
    }

    async fn ours(bytes: &[u8], chunk: usize) -> Vec<Said> {
        let mut frames = frames(bytes.to_vec(), chunk);
        frames.max_fragments = 1000;
        let mut said = Vec::new();
        loop {
            said.push(match frames.next().await {
                Ok(Incoming::Text(text)) => Said::Text(text.to_string()),
                Ok(Incoming::Binary) => Said::Binary,
                Ok(Incoming::Ping(bytes)) => Said::Ping(bytes.to_vec()),
                Ok(Incoming::Pong) => Said::Pong,
                Ok(Incoming::Fragment) => continue,
                Ok(Incoming::Close) => {
                    said.push(Said::Ended);
                    return said;
                }
                Err(ReadError::Gone) => return said,
                Err(_) => {
                    said.push(Said::Ended);
                    return said;
                }
            });
        }
    }

    #[test]
    fn it_says_of_any_bytes_what_another_implementation_says() {
        let runtime = actix_web::rt::Runtime::new().unwrap();
        testkit::fuzz::each(20_000, |rng| {
            let bytes = random_bytes(rng);
            let chunk = rng.random_range(1..400);
            let (ours, (theirs, early)) = (runtime.block_on(ours(&bytes, chunk)), oracle(&bytes));
            let later = |said: &Said| matches!(said, Said::Ping(_) | Said::Pong | Said::Ended);
            let same = if early {
                let before = theirs.len() - 1;
                ours.starts_with(&theirs[..before]) && ours[before..].iter().all(later)
            } else {
                // Of a frame that is cut, this one looks at the header, the other at nothing.
                ours == theirs || ours.split_last() == Some((&Said::Ended, &theirs[..]))
            };
            if !same {
                let path = std::env::temp_dir().join("frame_reader.fuzz");
                std::fs::write(&path, &bytes).unwrap();
                let ends =
                    |said: &[Said]| format!("{} and at last {:.60?}", said.len(), said.last());
                panic!("{}: {}, but {}", path.display(), ends(&ours), ends(&theirs));
            }
        });
    }
}
