//! Serves clients: what `HttpServer` does, over connections that can be cut.

use super::App;
use super::tcp::Connection;
use crate::config::Limits;
use actix_http::{HttpService, Protocol};
use actix_server::Server;
use actix_service::{IntoServiceFactory, ServiceFactoryExt, fn_service, map_config};
use actix_web::dev::AppConfig;
use actix_web::rt::net::TcpStream;
use actix_web::{App as WebApp, web};
use std::net::TcpListener;
use std::time::Duration;

/// Connections that wait to be accepted.
const BACKLOG: u32 = 4096;

/// Seconds for which requests under way may still be answered when the server stops.
const SHUTDOWN_SECONDS: u64 = 2;

/// A server for clients on a listener.
///
/// # Errors
/// If the listener cannot be used.
pub fn serve(
    listener: TcpListener,
    app: web::Data<App>,
    limits: &Limits,
) -> std::io::Result<Server> {
    let handshake = Duration::from_millis(limits.handshake_ms);
    let user_timeout = Duration::from_millis(limits.tcp_user_timeout_ms);
    let builder = Server::build();
    // Connections that are only kept alive end when the server stops, instead of holding it up. `HttpServer` does it in the
    // same way; the setter on the side of HTTP is not in the documentation of actix-http.
    let stopping = builder.graceful_shutdown_signal();
    let server = builder
        .backlog(BACKLOG)
        .max_concurrent_connections(limits.connections)
        .shutdown_timeout(SHUTDOWN_SECONDS)
        .disable_signals()
        .listen("clients", listener, move || {
            let routes = WebApp::new()
                .app_data(app.clone())
                .configure(super::routes)
                .into_factory()
                .map_err(|e: actix_web::Error| e.error_response());
            let stopping = stopping.clone();
            let http = HttpService::build()
                .graceful_shutdown_signal(move || {
                    let stopping = stopping.clone();
                    async move { stopping.notified().await }
                })
                .client_request_timeout(handshake)
                .on_connect_ext(|connection: &Connection, data| {
                    data.insert(connection.handle());
                })
                .finish(map_config(routes, |()| AppConfig::default()));
            fn_service(move |stream: TcpStream| async move {
                let peer = stream.peer_addr().ok();
                Ok((Connection::new(stream, user_timeout), Protocol::Http1, peer))
            })
            .and_then(http)
        })?;
    Ok(server.run())
}
