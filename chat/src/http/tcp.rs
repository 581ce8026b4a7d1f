//! The TCP connection of a client: its options, and a way to cut it.

use actix_web::HttpRequest;
use actix_web::rt::net::TcpStream;
use socket2::SockRef;
use std::cell::{Cell, RefCell};
use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio::time::{Sleep, sleep};
use tokio_rustls::server::TlsStream;

/// Enough for a page on a slow line.
const SEND_BUFFER_BYTES: usize = 128 * 1024;

/// How long a client may take to end its half of a connection after ours.
const LINGER: Duration = Duration::from_secs(1);

/// A connection that a [`TcpHandle`] can cut.
pub struct Connection {
    stream: Stream,
    handle: TcpHandle,
    /// Set when our half has ended: how long that of the client is waited for.
    lingers: Option<Pin<Box<Sleep>>>,
}

/// The bytes of a connection.
enum Stream {
    Plain(TcpStream),
    /// It is large, and most connections are without it.
    Encrypted(Box<TlsStream<TcpStream>>),
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(stream) => Pin::new(stream).poll_read(context, buffer),
            Stream::Encrypted(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Plain(stream) => Pin::new(stream).poll_write(context, bytes),
            Stream::Encrypted(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(stream) => Pin::new(stream).poll_flush(context),
            Stream::Encrypted(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(stream) => Pin::new(stream).poll_shutdown(context),
            Stream::Encrypted(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}

/// Cuts a connection. Closing a WebSocket waits until the client has read what was sent before;
/// cutting the connection does not. It is a flag and not a second descriptor: a session costs one
/// of them.
#[derive(Clone, Default)]
pub struct TcpHandle(Rc<State>);

/// A connection and its handles stay on one worker thread.
#[derive(Default)]
struct State {
    cut: Cell<bool>,
    /// The connection is dropped.
    gone: Cell<bool>,
    is_gone: Notify,
    /// The task that reads and writes the connection.
    task: RefCell<Option<Waker>>,
}

/// Sets the options of a new connection.
pub fn set_options(stream: &TcpStream, user_timeout: Duration) {
    let socket = SockRef::from(stream);
    // A client that vanished is noticed when what we send is not acknowledged for this long. If an
    // option cannot be set the connection still works, and pings notice in the end.
    let _ = socket.set_tcp_user_timeout(Some(user_timeout));
    let _ = socket.set_tcp_nodelay(true);
    // What a client does not read must not gather in the kernel instead of in its queue.
    let _ = socket.set_send_buffer_size(SEND_BUFFER_BYTES);
}

impl Connection {
    /// A connection without TLS.
    pub fn plain(stream: TcpStream) -> Self {
        Self::of(Stream::Plain(stream))
    }

    /// A connection with TLS, after the handshake.
    pub fn encrypted(stream: TlsStream<TcpStream>) -> Self {
        Self::of(Stream::Encrypted(Box::new(stream)))
    }

    fn of(stream: Stream) -> Self {
        Self {
            stream,
            handle: TcpHandle::default(),
            lingers: None,
        }
    }

    /// The handle that cuts it.
    pub fn handle(&self) -> TcpHandle {
        self.handle.clone()
    }

    /// Does `io` unless the connection is cut, and is polled again when it is.
    fn unless_cut<T>(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        io: impl FnOnce(Pin<&mut Stream>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        let this = self.get_mut();
        if this.handle.0.cut.get() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        let done = io(Pin::new(&mut this.stream), context);
        if done.is_pending() {
            let mut task = this.handle.0.task.borrow_mut();
            match &mut *task {
                Some(task) => task.clone_from(context.waker()),
                none => *none = Some(context.waker().clone()),
            }
        }
        done
    }
}

impl TcpHandle {
    /// The handle of the connection of a request.
    #[must_use]
    pub fn of(request: &HttpRequest) -> Self {
        request
            .conn_data::<TcpHandle>()
            .cloned()
            .unwrap_or_default()
    }

    /// Waits until the connection is gone.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn gone(&self) {
        let is_gone = self.0.is_gone.notified();
        if !self.0.gone.get() {
            is_gone.await;
        }
    }

    /// Ends the connection now.
    pub fn cut(&self) {
        self.0.cut.set(true);
        if let Some(task) = self.0.task.take() {
            task.wake();
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.handle.0.gone.set(true);
        self.handle.0.is_gone.notify_waiters();
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.unless_cut(context, |stream, context| stream.poll_read(context, buffer))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.unless_cut(context, |stream, context| stream.poll_write(context, bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.unless_cut(context, |stream, context| stream.poll_flush(context))
    }

    /// Ends our half at once, which a client waits for that has closed its WebSocket (RFC 6455,
    /// 7.1.1). Then reads and forgets until the client ends its half: bytes that are not read would
    /// make the kernel reset the connection, and the client could lose the last that was sent to
    /// it.
    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.lingers.is_none() {
            let ended = self
                .as_mut()
                .unless_cut(context, |stream, context| stream.poll_shutdown(context));
            ready!(ended)?;
            self.lingers = Some(Box::pin(sleep(LINGER)));
        }
        let lingers = self
            .lingers
            .as_mut()
            .map(|lingers| lingers.as_mut().poll(context));
        if lingers.is_some_and(|lingers| lingers.is_ready()) {
            return Poll::Ready(Ok(()));
        }
        loop {
            let mut bytes = [MaybeUninit::uninit(); 1024];
            let mut buffer = ReadBuf::uninit(&mut bytes);
            ready!(self.as_mut().poll_read(context, &mut buffer))?;
            if buffer.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::task::Wake;

    /// Whether the task of a connection was woken.
    #[derive(Default)]
    struct Woken(AtomicBool);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    /// A task that waits in `io` is woken by the cut, and gets its error. The runtime does not run
    /// between the two, so that no other event of the socket wakes it.
    async fn is_cut<T>(
        mut io: impl FnMut(Pin<&mut Connection>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let _client = tokio::net::TcpStream::connect(address).await.unwrap();
        let (server, _) = listener.accept().await.unwrap();
        let mut connection = Connection::plain(server);
        let handle = connection.handle();
        let woken = Arc::new(Woken::default());
        let waker = Waker::from(woken.clone());
        let mut context = Context::from_waker(&waker);
        while let Poll::Ready(done) = io(Pin::new(&mut connection), &mut context) {
            assert!(done.is_ok());
        }
        woken.0.store(false, Ordering::Relaxed);
        handle.cut();
        assert!(woken.0.load(Ordering::Relaxed));
        let Poll::Ready(Err(error)) = io(Pin::new(&mut connection), &mut context) else {
            panic!("data after the cut");
        };
        assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
    }

    #[tokio::test]
    async fn a_writer_that_waits_for_a_slow_reader_is_cut() {
        is_cut(|connection, context| connection.poll_write(context, &[0; 65536])).await;
    }

    #[tokio::test]
    async fn a_reader_that_waits_is_cut() {
        is_cut(|connection, context| connection.poll_read(context, &mut ReadBuf::new(&mut [0; 1])))
            .await;
    }
}
