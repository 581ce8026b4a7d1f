//! Everything that is reached over HTTP: every route on one screen.

mod admin;
mod asyncapi;
mod auth;
mod client_address;
mod connection_limiter;
mod errors;
mod methods;
mod door;
mod frame_reader;
mod health;
mod page;
mod rest;
mod rooms;
mod tcp;
mod ws;
mod tls;
mod listener;

pub use asyncapi::document as asyncapi_document;
pub use auth::{Admission, SAMPLE_SECRET, Tokens};
pub use connection_limiter::ConnectionLimiter;
pub use errors::HttpError;
pub use listener::{Listener, listen};
pub use rest::document as openapi_document;
pub use tls::Tls;

use crate::cluster::{Peers, Revocations};
use crate::config::Secret;
use crate::delivery::Reconcile;
use crate::domain::dialog::UserId;
use crate::error::ApiError;
use crate::rate_limit::RateLimiter;
use crate::resharding::Resharding;
use crate::session::Context;
use actix_cors::Cors;
use actix_web::http::Method;
use actix_web::http::header::{AUTHORIZATION, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use actix_web::middleware::from_fn;
use actix_web::{HttpRequest, web};
use chat_wire::ErrorCode;
use methods::at;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use tokio::sync::Semaphore;
use tokio_util::task::AbortOnDropHandle;
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
    /// Origins of pages that may open a WebSocket and use REST.
    pub allowed_origins: Vec<String>,
    /// Names of this service.
    pub allowed_hosts: Vec<String>,
    /// Refused WebSockets that may be upgraded at once.
    pub upgraded_refusals: Arc<Semaphore>,
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
    /// Ends sessions whose token was revoked. Runs as long as the app.
    pub closes_revoked: AbortOnDropHandle<()>,
    /// Tokens that are refused.
    pub revocations: Revocations,
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
pub fn routes(config: &mut web::ServiceConfig, app: &App, body_bytes: usize) {
    let routes = web::scope("")
        .service(at("/").get(page::index).only())
        .service(at("/app.js").get(page::script).only())
        .service(at("/connection.js").get(page::connection).only())
        .service(at("/style.css").get(page::style).only())
        .service(at("/favicon.svg").get(page::icon).only())
        .service(at("/livez").get(health::live).only())
        .service(at("/readyz").get(health::ready).only())
        .service(at("/v1/ws").get(ws::connect).only())
        .service(at("/v1/dialogs").get(rest::inbox).only())
        .service(at(MESSAGES).get(rest::history).post(rest::send).only())
        .service(at("/v1/dialogs/{user}/read").put(rest::mark_read).only())
        .service(at("/v1/rooms").post(rooms::create).only())
        .service(at("/v1/rooms/{room}").get(rooms::room).only())
        .service(
            at("/v1/rooms/{room}/members")
                .get(rooms::members)
                .post(rooms::change)
                .only(),
        )
        .service(
            at("/v1/rooms/{room}/messages")
                .get(rooms::history)
                .post(rooms::send)
                .only(),
        )
        .service(at("/v1/rooms/{room}/read").put(rooms::mark_read).only())
        .service(at("/v1/rooms/{room}/readers").get(rooms::readers).only())
        .service(at("/v1/users/{user}/presence").get(rest::presence).only())
        .service(at("/v1/dev/token").post(rest::dev_token).only())
        .service(at("/v1/asyncapi.json").get(asyncapi::asyncapi).only())
        .service(at("/docs").get(page::to_docs).only())
        .service(SwaggerUi::new("/docs/{_:.*}").url("/v1/openapi.json", rest::ApiDoc::openapi()))
        .default_service(web::to(unknown))
        .wrap(cors(&app.allowed_origins))
        .wrap(from_fn(door::clients));
    config.service(routes);
    limits(config, body_bytes);
}

const MESSAGES: &str = "/v1/dialogs/{user}/messages";

/// Pages of these origins may use the REST API; they have no cookie here, and bring a token.
fn cors(origins: &[String]) -> Cors {
    let cors = Cors::default()
        .allowed_methods([Method::GET, Method::HEAD, Method::POST, Method::PUT])
        .allowed_headers([AUTHORIZATION, CONTENT_TYPE])
        .expose_headers([RETRY_AFTER, WWW_AUTHENTICATE])
        .max_age(3600);
    let allow = |cors: Cors, origin: &String| cors.allowed_origin(origin);
    origins.iter().fold(cors, allow)
}

/// The routes for operators, on a listener of its own.
pub fn admin_routes(config: &mut web::ServiceConfig, _: &App, body_bytes: usize) {
    let routes = web::scope("")
        .service(at("/metrics").get(admin::metrics).only())
        .service(at("/livez").get(health::live).only())
        .service(at("/readyz").get(health::ready).only())
        .service(at("/admin/topology").get(admin::topology).only())
        .service(at("/admin/shards").get(admin::shards).only())
        .service(at("/admin/where/{a}/{b}").get(admin::locate).only())
        .service(at("/admin/slots").get(admin::slots).only())
        .service(at("/admin/users/{user}").get(admin::user).only())
        .service(
            at("/admin/users/{user}/disconnect")
                .post(admin::disconnect)
                .only(),
        )
        .service(at("/admin/users/{user}/revoke").post(admin::revoke).only())
        .service(at("/admin/resharding").get(admin::resharding).only())
        .service(at("/admin/plan").post(admin::plan).only())
        .service(at("/admin/resharding/pause").post(admin::pause).only())
        .service(at("/admin/resharding/resume").post(admin::resume).only())
        .default_service(web::to(unknown))
        .wrap(from_fn(door::operators));
    config.service(routes);
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
