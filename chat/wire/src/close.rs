//! Why a server closes a WebSocket.

/// A close code of the service, with the reason text that goes with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Close {
    /// 1000: the client asked to close.
    Normal,
    /// 1002: the peer does not speak WebSocket.
    ProtocolError,
    /// 1007: a text frame that is not UTF-8.
    InvalidText,
    /// 1009: a frame or a message over the limit.
    TooLarge,
    /// 1012: the instance is going away; reconnect with jitter.
    Restart,
    /// 4001: no token, a bad one, or one that has expired.
    Unauthenticated,
    /// 4003: an `Origin` that is not on the allow-list.
    ForbiddenOrigin,
    /// 4008: the client does not read what is sent to it.
    SlowReader,
    /// 4009: more sessions than one user may have on an instance.
    TooManyConnections,
    /// 4010: an operator has ended the sessions of the user.
    Disconnected,
    /// 4029: more frames a second than allowed.
    TooManyFrames,
    /// 4000: the client sent nothing for too long, not even an answer to a ping.
    Silent,
}

impl Close {
    /// Every close code, for documentation and metrics.
    pub const ALL: [Close; 12] = [
        Close::Normal,
        Close::ProtocolError,
        Close::InvalidText,
        Close::TooLarge,
        Close::Restart,
        Close::Silent,
        Close::Unauthenticated,
        Close::ForbiddenOrigin,
        Close::SlowReader,
        Close::TooManyConnections,
        Close::Disconnected,
        Close::TooManyFrames,
    ];

    /// The number on the wire.
    #[must_use]
    pub const fn code(self) -> u16 {
        match self {
            Close::Normal => 1000,
            Close::ProtocolError => 1002,
            Close::InvalidText => 1007,
            Close::TooLarge => 1009,
            Close::Restart => 1012,
            Close::Silent => 4000,
            Close::Unauthenticated => 4001,
            Close::ForbiddenOrigin => 4003,
            Close::SlowReader => 4008,
            Close::TooManyConnections => 4009,
            Close::Disconnected => 4010,
            Close::TooManyFrames => 4029,
        }
    }

    /// The short text sent beside the number; also the label in metrics.
    #[must_use]
    pub const fn reason(self) -> &'static str {
        match self {
            Close::Normal => "normal",
            Close::ProtocolError => "protocol_error",
            Close::InvalidText => "invalid_text",
            Close::TooLarge => "frame_too_large",
            Close::Restart => "restart",
            Close::Silent => "silent",
            Close::Unauthenticated => "unauthenticated",
            Close::ForbiddenOrigin => "forbidden_origin",
            Close::SlowReader => "slow_reader",
            Close::TooManyConnections => "too_many_connections",
            Close::Disconnected => "disconnected",
            Close::TooManyFrames => "too_many_frames",
        }
    }
}
