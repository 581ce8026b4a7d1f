//! The queue of frames to one session: bounded in bytes, filled without waiting.

use bytestring::ByteString;
use chat_wire::Close;
use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use tokio::sync::Notify;

/// The queue between the senders of frames and the writer of a session.
///
/// A frame is encoded once and shared by all its receivers. When the queue is full the session is
/// closed as a slow reader, so that no sender waits for it and no other session is affected.
pub struct OutboundQueue {
    limit_bytes: usize,
    state: Mutex<State>,
    /// Wakes the writer.
    filled: Notify,
    /// Wakes the tasks that wait for room.
    drained: Notify,
}

#[derive(Default)]
struct State {
    frames: VecDeque<ByteString>,
    bytes: usize,
    close: Option<Close>,
}

/// The next step of the writer.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// Send this frame.
    Frame(ByteString),
    /// Close the connection. The queue is empty, unless the session is closed as a slow reader.
    Close(Close),
}

impl OutboundQueue {
    /// An empty queue of at most `limit_bytes`.
    #[must_use]
    pub fn new(limit_bytes: usize) -> Self {
        Self {
            limit_bytes,
            state: Mutex::default(),
            filled: Notify::new(),
            drained: Notify::new(),
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a frame, or closes the session as a slow reader if there is no room.
    pub fn push(&self, frame: ByteString) {
        let mut state = self.state();
        if state.close == Some(Close::SlowReader) {
            return;
        }
        // A frame larger than the limit may be queued alone.
        if state.bytes > 0 && state.bytes + frame.len() > self.limit_bytes {
            *state = State {
                close: Some(Close::SlowReader),
                ..State::default()
            };
        } else {
            state.bytes += frame.len();
            state.frames.push_back(frame);
        }
        drop(state);
        self.filled.notify_one();
    }

    /// Adds a frame unless many frames are queued: for events that are worthless later, such as
    /// `typing`.
    pub fn push_if_idle(&self, frame: &ByteString) {
        if self.state().bytes <= self.limit_bytes / 4 {
            self.push(frame.clone());
        }
    }

    /// Adds a frame when half of the queue is free: for answers to the session's own requests,
    /// which can wait.
    ///
    /// # Cancel safety
    /// Dropped before it is done, it has added nothing.
    pub async fn push_when_room(&self, frame: ByteString) {
        self.room().await;
        self.push(frame);
    }

    /// Waits until half of the queue is free, or the session is closed as a slow reader.
    pub async fn room(&self) {
        loop {
            let drained = self.drained.notified();
            {
                let state = self.state();
                if state.close == Some(Close::SlowReader) {
                    return;
                }
                if state.bytes <= self.limit_bytes / 2 {
                    break;
                }
            }
            drained.await;
        }
    }

    /// Closes the session after the frames that are queued now or until it ends. The first reason
    /// is kept.
    pub fn close(&self, reason: Close) {
        let mut state = self.state();
        if state.close.is_none() {
            state.close = Some(reason);
        }
        drop(state);
        self.filled.notify_one();
        self.drained.notify_waiters();
    }

    /// Waits for the next step.
    ///
    /// # Cancel safety
    /// Dropped before it is done, it has taken nothing.
    pub async fn next(&self) -> Next {
        loop {
            {
                let mut state = self.state();
                if let Some(frame) = state.frames.pop_front() {
                    state.bytes -= frame.len();
                    if state.bytes <= self.limit_bytes / 2 {
                        self.drained.notify_waiters();
                    }
                    return Next::Frame(frame);
                }
                if let Some(close) = state.close {
                    return Next::Close(close);
                }
            }
            self.filled.notified().await;
        }
    }

    /// The reason to close, once the session is a slow reader: no more frames need to be written.
    #[must_use]
    pub fn overflowed(&self) -> bool {
        self.state().close == Some(Close::SlowReader)
    }

    /// Waits until the queue is full.
    pub async fn overflow(&self) {
        while !self.overflowed() {
            let filled = self.filled.notified();
            if self.overflowed() {
                break;
            }
            filled.await;
        }
        // This task may have taken a notification that was meant for the writer.
        self.filled.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn frames_come_out_in_order_and_the_close_comes_last() {
        let outbound = OutboundQueue::new(100);
        outbound.push("a".into());
        outbound.push("b".into());
        outbound.close(Close::Restart);
        outbound.push("c".into());
        for frame in ["a", "b", "c"] {
            assert_eq!(outbound.next().await, Next::Frame(frame.into()));
        }
        assert_eq!(outbound.next().await, Next::Close(Close::Restart));
    }

    #[tokio::test]
    async fn a_full_queue_drops_what_it_holds_and_closes_the_session() {
        let outbound = OutboundQueue::new(10);
        outbound.push("123456".into());
        assert!(!outbound.overflowed());
        outbound.push("12345".into());
        outbound.overflow().await;
        assert_eq!(outbound.next().await, Next::Close(Close::SlowReader));
    }

    #[tokio::test]
    async fn one_large_answer_fits_into_an_empty_queue_and_the_next_waits_for_room() {
        let outbound = OutboundQueue::new(10);
        outbound
            .push_when_room("a large answer of its own".into())
            .await;
        let second = outbound.push_when_room("second".into());
        tokio::pin!(second);
        assert!(futures_util::poll!(&mut second).is_pending());
        assert_eq!(
            outbound.next().await,
            Next::Frame("a large answer of its own".into())
        );
        second.await;
        assert_eq!(outbound.next().await, Next::Frame("second".into()));
    }
}
