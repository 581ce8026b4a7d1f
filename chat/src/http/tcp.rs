//! The TCP connection of a client: its options, and a way to cut it.

use actix_web::HttpRequest;
use actix_web::rt::net::TcpStream;
use socket2::SockRef;
use std::cell::{Cell, RefCell};
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Enough for a page on a slow line.
const SEND_BUFFER_BYTES: usize = 128 * 1024;

/// A connection that a [`TcpHandle`] can cut.
pub struct Connection {
    stream: TcpStream,
    handle: TcpHandle,
}

/// Cuts a connection. Closing a WebSocket waits until the client has read what was sent before; cutting the connection does
/// not. It is a flag and not a second descriptor: a session costs one of them.
#[derive(Clone, Default)]
pub struct TcpHandle(Rc<State>);

/// A connection and its handles stay on one worker thread.
#[derive(Default)]
struct State {
    cut: Cell<bool>,
    /// The task that reads and writes the connection.
    task: RefCell<Option<Waker>>,
}

impl Connection {
    /// Sets the options of a new connection.
    pub fn new(stream: TcpStream, user_timeout: Duration) -> Self {
        let socket = SockRef::from(&stream);
        // A client that vanished is noticed when what we send is not acknowledged for this long. If an option cannot be
        // set the connection still works, and pings notice in the end.
        let _ = socket.set_tcp_user_timeout(Some(user_timeout));
        let _ = socket.set_tcp_nodelay(true);
        // What a client does not read must not gather in the kernel instead of in its queue.
        let _ = socket.set_send_buffer_size(SEND_BUFFER_BYTES);
        let handle = TcpHandle::default();
        Self { stream, handle }
    }

    /// The handle that cuts it.
    pub fn handle(&self) -> TcpHandle {
        self.handle.clone()
    }

    /// Does `io` unless the connection is cut, and is polled again when it is.
    fn unless_cut<T>(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        io: impl FnOnce(Pin<&mut TcpStream>, &mut Context<'_>) -> Poll<io::Result<T>>,
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

    /// Ends the connection now.
    pub fn cut(&self) {
        self.0.cut.set(true);
        if let Some(task) = self.0.task.take() {
            task.wake();
        }
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

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.unless_cut(context, |stream, context| stream.poll_shutdown(context))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    /// A client that does not read, and the server's side with all buffers full.
    async fn stuck() -> (tokio::net::TcpStream, Connection) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let client = tokio::net::TcpStream::connect(address).await.unwrap();
        let (server, _) = listener.accept().await.unwrap();
        let mut connection = Connection::new(server, Duration::from_secs(30));
        let full = std::future::poll_fn(|context| {
            while let Poll::Ready(written) =
                Pin::new(&mut connection).poll_write(context, &[0; 65536])
            {
                written.unwrap();
            }
            Poll::Ready(())
        });
        full.await;
        connection.handle.0.task.take();
        (client, connection)
    }

    /// Runs `io` in a task of its own, cuts the connection while it waits, and returns the error. Without a wake-up it would wait
    /// for ever.
    async fn cut_while<T: 'static>(
        io: impl AsyncFnOnce(&mut Connection) -> io::Result<T> + 'static,
    ) -> io::ErrorKind {
        let (_client, mut connection) = stuck().await;
        let handle = connection.handle();
        let cut = async {
            let waiting = tokio::task::spawn_local(async move { io(&mut connection).await.err() });
            while handle.0.task.borrow().is_none() {
                tokio::task::yield_now().await;
            }
            handle.cut();
            waiting.await.unwrap().unwrap().kind()
        };
        tokio::task::LocalSet::new().run_until(cut).await
    }

    #[tokio::test]
    async fn a_writer_that_waits_for_a_slow_reader_is_cut() {
        let error = cut_while(async |connection| connection.write_all(b"more").await);
        assert_eq!(error.await, io::ErrorKind::ConnectionAborted);
    }

    #[tokio::test]
    async fn a_reader_that_waits_is_cut() {
        let error = cut_while(async |connection| connection.read(&mut [0; 1]).await);
        assert_eq!(error.await, io::ErrorKind::ConnectionAborted);
    }
}
