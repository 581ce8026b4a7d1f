//! Everything that is reached over HTTP: every route on one screen.

mod admin;
mod asyncapi;
mod auth;
mod client_address;
mod connection_limiter;
mod errors;
mod frame_reader;
mod health;
mod page;
mod rest;
mod tcp;
mod ws;
mod listener;

pub use asyncapi::document as asyncapi_document;
pub use auth::{SAMPLE_SECRET, Tokens};
pub use connection_limiter::ConnectionLimiter;
pub use errors::HttpError;
pub use listener::{Listener, listen};

use crate::cluster::Peers;
use crate::config::Secret;
use crate::delivery::Reconcile;
use crate::domain::dialog::UserId;
use crate::error::ApiError;
use crate::rate_limit::RateLimiter;
use crate::resharding::Resharding;
use crate::session::Context;
use actix_web::{HttpRequest, web};
use chat_wire::ErrorCode;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use utoipa::OpenApi;
use utoipa_swagger_ui::SwaggerUi;

/// What the handlers share.
pub struct App {
    /// What sessions share.
    pub context: Context,
    /// Mints tokens in embedded mode.
    pub tokens: Arc<Tokens>,
    /// Whether `POST /v1/dev/token` is there.
    pub dev_tokens: bool,
    /// Origins of pages that may open a WebSocket.
    pub allowed_origins: Vec<String>,
    /// Counts WebSockets.
    pub connections: ConnectionLimiter,
    /// How fast an address may open them.
    pub connects: RateLimiter<IpAddr>,
    /// How fast a user may ask over REST.
    pub requests: RateLimiter<UserId>,
    /// Whether the last entry of `X-Forwarded-For` is the client's address.
    pub trust_forwarded_for: bool,
    /// Set while the instance is going away.
    pub draining: AtomicBool,
    /// Changes of the shard set.
    pub resharding: Resharding,
    /// The other instances.
    pub peers: Peers,
    /// Runs as long as the app.
    pub reconcile: Reconcile,
    /// Asked of operators.
    pub admin_token: Option<Secret>,
}

impl App {
    /// The address of a client, as limits count it; `None` if it is not known.
    fn address_of(&self, request: &HttpRequest) -> Option<IpAddr> {
        let peer = request.peer_addr().map(|peer| peer.ip());
        let forwarded = || {
            let header = request.headers().get_all("x-forwarded-for").last();
            let text = header.and_then(|header| header.to_str().ok());
            let address = text.and_then(client_address::last_forwarded);
            if address.is_none() {
                static ONCE: std::sync::Once = std::sync::Once::new();
                ONCE.call_once(|| {
                    tracing::warn!(
                        header = text.unwrap_or("(none)"),
                        "trust_forwarded_for is set, but X-Forwarded-For has no address: the address of the proxy counts"
                    );
                });
            }
            address
        };
        let address = if self.trust_forwarded_for {
            forwarded().or(peer)
        } else {
            peer
        };
        address.map(client_address::counted)
    }
}

/// The routes for clients; `body_bytes` is the largest body.
pub fn routes(config: &mut web::ServiceConfig, body_bytes: usize) {
    config
        .route("/", web::get().to(page::index))
        .route("/app.js", web::get().to(page::script))
        .route("/connection.js", web::get().to(page::connection))
        .route("/style.css", web::get().to(page::style))
        .route("/favicon.svg", web::get().to(page::icon))
        .route("/livez", web::get().to(health::live))
        .route("/readyz", web::get().to(health::ready))
        .route("/v1/ws", web::get().to(ws::connect))
        .route("/v1/dialogs", web::get().to(rest::inbox))
        .route("/v1/dialogs/{user}/messages", web::post().to(rest::send))
        .route("/v1/dialogs/{user}/messages", web::get().to(rest::history))
        .route("/v1/dialogs/{user}/read", web::put().to(rest::mark_read))
        .route("/v1/users/{user}/presence", web::get().to(rest::presence))
        .route("/v1/dev/token", web::post().to(rest::dev_token))
        .route("/v1/asyncapi.json", web::get().to(asyncapi::asyncapi))
        .route("/docs", web::get().to(page::to_docs))
        .service(SwaggerUi::new("/docs/{_:.*}").url("/v1/openapi.json", rest::ApiDoc::openapi()))
        .default_service(web::to(unknown));
    limits(config, body_bytes);
}

/// The routes for operators, on a listener of their own.
pub fn admin_routes(config: &mut web::ServiceConfig, body_bytes: usize) {
    config
        .route("/metrics", web::get().to(admin::metrics))
        .route("/livez", web::get().to(health::live))
        .route("/readyz", web::get().to(health::ready))
        .route("/admin/topology", web::get().to(admin::topology))
        .route("/admin/shards", web::get().to(admin::shards))
        .route("/admin/where/{a}/{b}", web::get().to(admin::locate))
        .route("/admin/slots", web::get().to(admin::slots))
        .route("/admin/resharding", web::get().to(admin::resharding))
        .route("/admin/plan", web::post().to(admin::plan))
        .route("/admin/resharding/pause", web::post().to(admin::pause))
        .route("/admin/resharding/resume", web::post().to(admin::resume))
        .default_service(web::to(unknown));
    limits(config, body_bytes);
}

/// Errors of the extractors have the same form as all others.
fn limits(config: &mut web::ServiceConfig, body_bytes: usize) {
    config
        .app_data(
            web::JsonConfig::default()
                .limit(body_bytes)
                .error_handler(|e, _| {
                    use actix_web::error::JsonPayloadError as E;
                    let too_large = matches!(e, E::Overflow { .. } | E::OverflowKnownLength { .. });
                    let code = if too_large {
                        ErrorCode::FrameTooLarge
                    } else {
                        ErrorCode::BadRequest
                    };
                    HttpError::from(ApiError::new(code, e.to_string())).into()
                }),
        )
        .app_data(web::QueryConfig::default().error_handler(|e, _| {
            HttpError::from(ApiError::new(ErrorCode::BadRequest, e.to_string())).into()
        }));
}

async fn unknown() -> Result<&'static str, HttpError> {
    Err(ApiError::new(
        ErrorCode::NotFound,
        "there is nothing here; the API is described at /docs",
    ))?
}
