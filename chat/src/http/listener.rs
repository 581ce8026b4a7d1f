//! Accepts connections and serves HTTP on them, on all threads: what `HttpServer` does, but over
//! connections that can be cut, and on the threads that the rest of the process lives on.

use super::client_address;
use super::connection_limiter::{ConnectionLimiter, ConnectionPermit};
use super::tcp::{Connection, set_options};
use super::tls::Tls;
use crate::audit;
use crate::config::Limits;
use crate::threads::Threads;
use actix_http::{HttpService, Protocol};
use actix_service::{IntoServiceFactory, Service, ServiceFactory, ServiceFactoryExt, map_config};
use actix_web::dev::AppConfig;
use actix_web::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, HeaderName, HeaderValue, REFERRER_POLICY,
    X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
};
use actix_web::middleware::DefaultHeaders;
use actix_web::rt::net::TcpStream;
use actix_web::{App as WebApp, web};
use chat_wire::ErrorCode;
use socket2::{Domain, Socket, Type};
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 4096;

/// How long the accepting of connections rests when the system has no more descriptors.
const REST: Duration = Duration::from_millis(100);

/// How long requests under way may still take when the server stops.
const STOP_LIMIT: Duration = Duration::from_secs(2);

/// What the page of the API description needs; the page of dialogs has a policy of its own.
const POLICY: &str = "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'";

/// What a proxy or a browser must not keep or guess; a route may set its own.
const HEADERS: [(HeaderName, &str); 5] = [
    (CACHE_CONTROL, "no-store"),
    (X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (REFERRER_POLICY, "no-referrer"),
    (X_FRAME_OPTIONS, "DENY"),
    (CONTENT_SECURITY_POLICY, POLICY),
];

/// A connection, and its places: among all connections, and among those of its address.
type Accepted = (
    std::net::TcpStream,
    OwnedSemaphorePermit,
    Option<ConnectionPermit>,
);

/// Connections of one address, of any kind.
fn by_address(limits: &Limits) -> ConnectionLimiter {
    let per_ip = limits.connections_per_ip;
    let per_ip = per_ip.saturating_add(limits.spare_connections_per_ip);
    ConnectionLimiter::new(per_ip, usize::MAX)
}

/// A server that accepts connections.
pub struct Listener {
    accepting: JoinHandle<()>,
    stopping: CancellationToken,
    places: Arc<Semaphore>,
    /// What `places` began with.
    all_places: u32,
}

/// Listens on an address. Port 0 is replaced by a real one.
///
/// # Errors
/// If the address cannot be listened on.
pub fn listen(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    // A restart must not wait until the connections of before are forgotten.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

impl Listener {
    /// Serves the routes that `configure` gives to those who connect. Each thread takes its turn
    /// with a connection. `of_proxy`: the connections are those of a proxy, so that their address
    /// says nothing.
    ///
    /// # Errors
    /// If the listener cannot be used.
    pub fn serve(
        listener: std::net::TcpListener,
        tls: Option<Tls>,
        threads: &Threads,
        limits: &Limits,
        of_proxy: bool,
        configure: impl Fn(&mut web::ServiceConfig) + Clone + Send + 'static,
    ) -> io::Result<Self> {
        let stopping = CancellationToken::new();
        let mut queues = Vec::new();
        threads.spawn_on_each(|| {
            // Bounded by the places.
            let (queue, accepted) = mpsc::unbounded_channel();
            queues.push(queue);
            let (configure, stopping, limits, tls) = (
                configure.clone(),
                stopping.clone(),
                limits.clone(),
                tls.clone(),
            );
            Box::new(move || serve_connections(accepted, configure, stopping, limits, tls))
        });
        let all_places = limits
            .connections
            .saturating_add(limits.spare_connections)
            .min(Semaphore::MAX_PERMITS)
            .try_into()
            .unwrap_or(u32::MAX);
        let places = Arc::new(Semaphore::new(all_places as usize));
        let by_address = (!of_proxy).then(|| by_address(limits));
        let listener = {
            let _context = threads.store().enter();
            TcpListener::from_std(listener)?
        };
        let accepting = threads
            .store()
            .spawn(accept(listener, places.clone(), by_address, queues));
        Ok(Self {
            accepting,
            stopping,
            places,
            all_places,
        })
    }

    /// Waits for a failure: a thread that no longer serves connections.
    pub async fn failed(&mut self) {
        let _ = (&mut self.accepting).await;
    }

    /// Stops accepting connections, and gives requests in flight some time to be answered.
    pub async fn stop(self) {
        self.accepting.abort();
        let _ = self.accepting.await;
        self.stopping.cancel();
        let _ = tokio::time::timeout(STOP_LIMIT, self.places.acquire_many(self.all_places)).await;
    }
}

/// Accepts connections and gives them to the threads in turn; ends when one of them takes no more.
async fn accept(
    listener: TcpListener,
    places: Arc<Semaphore>,
    by_address: Option<ConnectionLimiter>,
    queues: Vec<mpsc::UnboundedSender<Accepted>>,
) {
    let mut logged = false;
    for queue in queues.iter().cycle() {
        // unwrap: it is never closed
        let place = places.clone().acquire_owned().await.unwrap();
        let (stream, of_address) = loop {
            match listener
                .accept()
                .await
                .and_then(|(stream, peer)| Ok((stream.into_std()?, peer)))
            {
                Ok((stream, peer)) => {
                    let Some(limiter) = &by_address else {
                        break (stream, None);
                    };
                    let address = client_address::counted(peer.ip());
                    match limiter.take(Some(address)) {
                        Some(place) => break (stream, Some(place)),
                        // Closed without an answer: one would cost more than it tells.
                        None => audit::refused(
                            "tcp",
                            Some(address),
                            ErrorCode::Overloaded,
                            "too many connections of this address",
                        ),
                    }
                }
                // It was closed before it was accepted.
                Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(e) => {
                    if !std::mem::replace(&mut logged, true) {
                        tracing::error!(error = %e, "connections cannot be accepted");
                    }
                    tokio::time::sleep(REST).await;
                }
            }
        };
        logged = false;
        if queue.send((stream, place, of_address)).is_err() {
            return;
        }
    }
}

/// Serves the connections that one thread is given.
async fn serve_connections(
    mut accepted: mpsc::UnboundedReceiver<Accepted>,
    configure: impl Fn(&mut web::ServiceConfig),
    stopping: CancellationToken,
    limits: Limits,
    tls: Option<Tls>,
) {
    let handshake = Duration::from_millis(limits.handshake_ms);
    let user_timeout = Duration::from_millis(limits.tcp_user_timeout_ms);
    let headers = HEADERS
        .into_iter()
        .fold(DefaultHeaders::new(), DefaultHeaders::add);
    let routes = WebApp::new()
        .wrap(headers)
        .configure(configure)
        .into_factory()
        .map_err(|e: actix_web::Error| {
            let mut response = e.error_response();
            for (name, value) in HEADERS {
                let value = HeaderValue::from_static(value);
                response.headers_mut().insert(name, value);
            }
            response
        });
    let http = HttpService::build()
        // Connections that are only kept alive end when the server stops, instead of holding it up.
        .graceful_shutdown_signal(move || stopping.clone().cancelled_owned())
        .client_request_timeout(handshake)
        .on_connect_ext(|connection: &Connection, data| {
            data.insert(connection.handle());
        })
        .finish(map_config(routes, |()| AppConfig::default()));
    let Ok(http) = http.new_service(()).await else {
        tracing::error!("the routes cannot be set up");
        return;
    };
    let http = Rc::new(http);
    while let Some((stream, place, of_address)) = accepted.recv().await {
        let Ok(stream) = TcpStream::from_std(stream) else {
            continue;
        };
        let (http, tls) = (http.clone(), tls.clone());
        tokio::task::spawn_local(async move {
            let peer = stream.peer_addr().ok();
            set_options(&stream, user_timeout);
            let connection = match tls {
                None => Connection::plain(stream),
                Some(tls) => {
                    let accepting = tls.acceptor().accept(stream);
                    match tokio::time::timeout(handshake, accepting).await {
                        Ok(Ok(stream)) => Connection::encrypted(stream),
                        Ok(Err(_)) | Err(_) => return,
                    }
                }
            };
            let request = (connection, Protocol::Http1, peer);
            // An error here concerns one client, which has its answer or is gone.
            let _ = serve_one(&*http, request).await;
            drop((place, of_address));
        });
    }
}

async fn serve_one<R, S: Service<R>>(service: &S, request: R) -> Result<S::Response, S::Error> {
    std::future::poll_fn(|context| service.poll_ready(context)).await?;
    service.call(request).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Settings;
    use std::collections::BTreeMap;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream as Client;
    use tokio::sync::Notify;

    fn socket() -> (SocketAddr, std::net::TcpListener) {
        let listener = listen(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        (listener.local_addr().unwrap(), listener)
    }

    async fn ask(address: SocketAddr) -> Client {
        let mut client = Client::connect(address).await.unwrap();
        client
            .write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            .await
            .unwrap();
        client
    }

    /// The head and body of an answer, as far as `end`.
    async fn answer(client: &mut Client, end: &str) -> String {
        let mut text = String::new();
        while !text.ends_with(end) {
            let mut bytes = [0; 512];
            let read = client.read(&mut bytes).await.unwrap();
            assert!(read > 0, "it ended after {text:?}");
            text += std::str::from_utf8(&bytes[..read]).unwrap();
        }
        text
    }

    #[tokio::test]
    async fn threads_take_turns_with_connections() {
        let threads = Threads::start(3).unwrap();
        let limits = Settings::from_toml("").unwrap().limits;
        let (address, listener) = socket();
        let server = Listener::serve(listener, None, &threads, &limits, false, |config| {
            let name = || async { format!("{}.", std::thread::current().name().unwrap()) };
            config.route("/", web::get().to(name));
        });
        let server = server.unwrap();
        let mut counts = BTreeMap::new();
        for _ in 0..6 {
            let text = answer(&mut ask(address).await, ".").await;
            let name = text.rsplit("\r\n").next().unwrap().to_owned();
            *counts.entry(name).or_insert(0) += 1;
        }
        let each_twice = ["chat-0.", "chat-1.", "chat-2."].map(|name| (name.to_owned(), 2));
        assert_eq!(counts, BTreeMap::from(each_twice));
        server.stop().await;
    }

    /// A connection that is only kept alive does not hold up the stop, and a request under way is
    /// answered.
    #[tokio::test]
    async fn a_stop_waits_for_requests_under_way_and_for_nothing_else() {
        let threads = Threads::start(1).unwrap();
        let limits = Settings::from_toml("").unwrap().limits;
        let (address, listener) = socket();
        let (begun, go_on) = (Arc::new(Semaphore::new(0)), Arc::new(Notify::new()));
        let requests = Arc::new(AtomicUsize::new(0));
        let seen = begun.clone();
        let goes_on = go_on.clone();
        let server = Listener::serve(listener, None, &threads, &limits, false, move |config| {
            let (begun, go_on, requests) = (seen.clone(), goes_on.clone(), requests.clone());
            let slow = move || {
                let (begun, go_on) = (begun.clone(), go_on.clone());
                let first = requests.fetch_add(1, Ordering::Relaxed) == 0;
                async move {
                    if !first {
                        begun.add_permits(1);
                        go_on.notified().await;
                    }
                    "done"
                }
            };
            config.route("/", web::get().to(slow));
        });
        let server = server.unwrap();
        let mut kept = ask(address).await;
        answer(&mut kept, "done").await;
        let mut under_way = ask(address).await;
        begun.acquire().await.unwrap().forget();
        let places = server.places.clone();
        let all_places = server.all_places as usize;
        let stopping = tokio::spawn(server.stop());
        assert_eq!(kept.read(&mut [0; 1]).await.unwrap(), 0, "kept alive");
        assert!(
            Client::connect(address).await.is_err(),
            "no connection is accepted"
        );
        assert!(!stopping.is_finished());
        go_on.notify_one();
        answer(&mut under_way, "done").await;
        stopping.await.unwrap();
        assert_eq!(places.available_permits(), all_places);
    }

    #[tokio::test]
    async fn a_connection_waits_for_a_place_and_a_thread_that_has_ended_ends_the_server() {
        let (address, listener) = socket();
        let places = Arc::new(Semaphore::new(1));
        let (queue, mut accepted) = mpsc::unbounded_channel();
        let listener = TcpListener::from_std(listener).unwrap();
        let accepting = tokio::spawn(accept(
            listener,
            places.clone(),
            Some(ConnectionLimiter::new(2, 10)),
            vec![queue],
        ));
        let _clients = (
            Client::connect(address).await.unwrap(),
            Client::connect(address).await.unwrap(),
        );
        let (_first, place, _) = accepted.recv().await.unwrap();
        // Every other task has had its turn, and the second client waits in the backlog.
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert!(accepted.try_recv().is_err());
        drop(place);
        let (_second, place, _) = accepted.recv().await.unwrap();
        drop((accepted, place));
        let _third = Client::connect(address).await.unwrap();
        accepting.await.unwrap();
    }
}
