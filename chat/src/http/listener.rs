//! Accepts connections and serves HTTP on them, on all threads: what `HttpServer` does, but over connections that can be cut, and
//! on the threads that the rest of the process lives on.

use super::App;
use super::tcp::Connection;
use crate::config::Limits;
use crate::threads::Threads;
use actix_http::{HttpService, Protocol};
use actix_service::{IntoServiceFactory, Service, ServiceFactory, ServiceFactoryExt, map_config};
use actix_web::dev::AppConfig;
use actix_web::rt::net::TcpStream;
use actix_web::{App as WebApp, web};
use socket2::{Domain, Socket, Type};
use std::convert::Infallible;
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

/// Connections beside those of WebSockets: requests, and WebSockets that are refused with a reason.
const SPARE_CONNECTIONS: usize = 1024;

/// How long the accepting of connections rests when the system has no more descriptors.
const REST: Duration = Duration::from_millis(100);

/// How long requests under way may still take when the server stops.
const STOP_LIMIT: Duration = Duration::from_secs(2);

/// A connection, and its place among the connections.
type Accepted = (std::net::TcpStream, OwnedSemaphorePermit);

/// The configuration of an actix application.
pub type Routes = fn(&mut web::ServiceConfig);

/// A server that accepts connections.
pub struct Listener {
    accepting: JoinHandle<Infallible>,
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
    /// Serves `routes` to those who connect. Each thread takes its turn with a connection.
    ///
    /// # Errors
    /// If the listener cannot be used.
    pub fn serve(
        listener: std::net::TcpListener,
        threads: &Threads,
        routes: Routes,
        app: &web::Data<App>,
        limits: &Limits,
    ) -> io::Result<Self> {
        let stopping = CancellationToken::new();
        let mut queues = Vec::new();
        threads.spawn_on_each(|| {
            // Bounded by the places.
            let (queue, accepted) = mpsc::unbounded_channel();
            queues.push(queue);
            let (app, stopping, limits) = (app.clone(), stopping.clone(), limits.clone());
            Box::new(move || serve_connections(accepted, routes, app, stopping, limits))
        });
        let all_places = limits
            .connections
            .saturating_add(SPARE_CONNECTIONS)
            .min(Semaphore::MAX_PERMITS)
            .try_into()
            .unwrap_or(u32::MAX);
        let places = Arc::new(Semaphore::new(all_places as usize));
        let listener = {
            let _context = threads.store().enter();
            TcpListener::from_std(listener)?
        };
        let accepting = threads
            .store()
            .spawn(accept(listener, places.clone(), queues));
        Ok(Self {
            accepting,
            stopping,
            places,
            all_places,
        })
    }

    /// Waits for an end that was not asked for.
    pub async fn failed(&mut self) -> tokio::task::JoinError {
        match (&mut self.accepting).await {
            Ok(never) => match never {},
            Err(error) => error,
        }
    }

    /// Accepts nobody any more, and gives requests under way some time to be answered.
    pub async fn stop(self) {
        self.accepting.abort();
        let _ = self.accepting.await;
        self.stopping.cancel();
        let _ = tokio::time::timeout(STOP_LIMIT, self.places.acquire_many(self.all_places)).await;
    }
}

async fn accept(
    listener: TcpListener,
    places: Arc<Semaphore>,
    queues: Vec<mpsc::UnboundedSender<Accepted>>,
) -> Infallible {
    let mut said = false;
    for queue in queues.iter().cycle() {
        // unwrap: it is never closed
        let place = places.clone().acquire_owned().await.unwrap();
        let stream = loop {
            match listener
                .accept()
                .await
                .and_then(|(stream, _)| stream.into_std())
            {
                Ok(stream) => break stream,
                // It was closed before it was accepted.
                Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(e) => {
                    if !std::mem::replace(&mut said, true) {
                        tracing::error!(error = %e, "connections cannot be accepted");
                    }
                    tokio::time::sleep(REST).await;
                }
            }
        };
        said = false;
        let _ = queue.send((stream, place));
    }
    unreachable!("there is at least one thread");
}

/// Serves the connections that one thread is given.
async fn serve_connections(
    mut accepted: mpsc::UnboundedReceiver<Accepted>,
    routes: Routes,
    app: web::Data<App>,
    stopping: CancellationToken,
    limits: Limits,
) {
    let handshake = Duration::from_millis(limits.handshake_ms);
    let user_timeout = Duration::from_millis(limits.tcp_user_timeout_ms);
    let routes = WebApp::new()
        .app_data(app)
        .configure(routes)
        .into_factory()
        .map_err(|e: actix_web::Error| e.error_response());
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
    while let Some((stream, place)) = accepted.recv().await {
        let Ok(stream) = TcpStream::from_std(stream) else {
            continue;
        };
        let http = http.clone();
        tokio::task::spawn_local(async move {
            let peer = stream.peer_addr().ok();
            let connection = Connection::new(stream, user_timeout);
            let request = (connection, Protocol::Http1, peer);
            // An error here is that of one client, who is told or gone.
            let _ = serve_one(&*http, request).await;
            drop(place);
        });
    }
}

async fn serve_one<R, S: Service<R>>(service: &S, request: R) -> Result<S::Response, S::Error> {
    std::future::poll_fn(|context| service.poll_ready(context)).await?;
    service.call(request).await
}
