//! The REST API: what the WebSocket does, a request at a time.

use super::{App, HttpError, auth, door};
use crate::audit;
use crate::budget::cost;
use crate::domain::dialog::UserId;
use crate::error::ApiError;
use crate::messages::{self, Outgoing, RequestError, Target};
use crate::session::range;
use actix_web::dev::Payload;
use actix_web::{FromRequest, HttpRequest, HttpResponse, web};
use chat_wire::{
    ChangeRoomRequest, CreateRoomRequest, DevTokenRequest, ErrorBody, ErrorCode, HistoryPage,
    InboxEntry, InboxPage, Message, Presence, ReadMark, ReadRequest, Role, Room, RoomHistory,
    RoomMember, RoomMembersPage, SendRequest, Sent, Token,
};
use serde::Deserialize;
use std::future::{Ready, ready};
use std::time::Duration;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::{IntoParams, IntoResponses, Modify, OpenApi};

/// The description of the API, served at `/v1/openapi.json`.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "chat",
        description = "Dialogs between two users, stored in order and delivered at once. docs/PROTOCOL.md explains the protocol; the WebSocket is described at /v1/asyncapi.json.",
        license(name = "MIT OR Apache-2.0", identifier = "MIT OR Apache-2.0")
    ),
    servers((url = "/", description = "The server that has this description")),
    tags(
        (name = "messages", description = "Send, read, and mark as read"),
        (name = "rooms", description = "Make, change, and use rooms"),
        (name = "users", description = "Who is online"),
        (name = "development", description = "For embedded mode only")
    ),
    paths(
        send, history, inbox, mark_read, presence, dev_token,
        super::rooms::create, super::rooms::room, super::rooms::members, super::rooms::change,
        super::rooms::send, super::rooms::history, super::rooms::mark_read, super::rooms::readers
    ),
    components(schemas(
        CreateRoomRequest, ChangeRoomRequest, Room, RoomMember, RoomMembersPage, RoomHistory, Role, SendRequest, Sent, Message, HistoryPage, InboxPage, InboxEntry, ReadRequest, ReadMark, Presence, DevTokenRequest, Token, ErrorBody, ErrorCode
    )),
    modifiers(&Bearer)
)]
pub struct ApiDoc;

/// The refusals of every route that needs a token.
#[derive(IntoResponses)]
#[allow(dead_code)] // for the description only
pub(super) enum Refusals {
    /// Malformed, or out of bounds.
    #[response(status = 400)]
    BadRequest(ErrorBody),
    /// No token, or one that is not valid.
    #[response(status = 401)]
    Unauthenticated(ErrorBody),
    /// A host that is not one of this service.
    #[response(status = 403)]
    Forbidden(ErrorBody),
    /// No such route, or a dialog without messages.
    #[response(status = 404)]
    NotFound(ErrorBody),
    /// The request did not arrive in time: try again.
    #[response(status = 408)]
    RequestTimeout(ErrorBody),
    /// A rate or a budget is exceeded: try again later.
    #[response(status = 429, headers(("Retry-After" = u32, description = "Seconds to wait")))]
    RateLimited(ErrorBody),
    /// A shard does not answer, a queue is full, or the time is over: try again, a send with the
    /// same key.
    #[response(status = 503, headers(("Retry-After" = u32, description = "Seconds to wait")))]
    Unavailable(ErrorBody),
}

/// The refusals of routes with a body.
#[derive(IntoResponses)]
#[allow(dead_code)] // for the description only
pub(super) enum BodyRefusals {
    /// The body is larger than `limits.frame_bytes`.
    #[response(status = 413)]
    TooLarge(ErrorBody),
}

/// The description as JSON. `docs/openapi.json` is a copy of it.
#[must_use]
pub fn document() -> serde_json::Value {
    serde_json::json!(ApiDoc::openapi())
}

struct Bearer;

impl Modify for Bearer {
    fn modify(&self, api: &mut utoipa::openapi::OpenApi) {
        if let Some(components) = api.components.as_mut() {
            let scheme = HttpBuilder::new()
                .scheme(HttpAuthScheme::Bearer)
                .bearer_format("JWT")
                .build();
            components.add_security_scheme("bearer", SecurityScheme::Http(scheme));
        }
    }
}

/// The user of the token. It is the first parameter of a handler, so that the token is checked
/// before the query and the body are read.
pub struct Caller(pub UserId);

impl FromRequest for Caller {
    type Error = HttpError;
    type Future = Ready<Result<Self, HttpError>>;

    fn from_request(request: &HttpRequest, _: &mut Payload) -> Self::Future {
        let app = request.app_data::<web::Data<App>>();
        let app = app
            .ok_or_else(|| HttpError(ApiError::new(ErrorCode::Internal, "the app is not set up")));
        ready(app.and_then(|app| caller(request, app).map(Caller)))
    }
}

fn caller(request: &HttpRequest, app: &App) -> Result<UserId, HttpError> {
    let missing = || {
        ApiError::new(
            ErrorCode::Unauthenticated,
            "no token; send it as Authorization: Bearer",
        )
    };
    let token = auth::token(request).ok_or_else(missing);
    let identity = token.and_then(|token| app.context.authenticate.authenticate(token));
    let user = identity
        .map_err(|refusal| unauthenticated(request, app, refusal))?
        .user;
    app.requests.check(&user).map_err(|wait| {
        let limit = app.context.limits.requests_per_second;
        let message = format!("too many requests: at most {limit} a second");
        counted(
            app,
            ApiError::new(ErrorCode::RateLimited, message).retry_after(wait),
        )
    })?;
    Ok(user)
}

/// Guesses of an address are counted with its new connections.
fn unauthenticated(request: &HttpRequest, app: &App, refusal: ApiError) -> HttpError {
    let address = app.address_of(request);
    audit::refused("rest", address, refusal.code, &refusal.message);
    match address.and_then(|address| app.connects.check(&address).err()) {
        None => counted(app, refusal),
        Some(wait) => {
            let message = "too many requests without a valid token from this address";
            let refusal = ApiError::new(ErrorCode::RateLimited, message);
            counted(app, refusal.retry_after(wait))
        }
    }
}

pub(super) fn counted(app: &App, refusal: impl Into<ApiError>) -> HttpError {
    let refusal = refusal.into();
    app.context.metrics.error(refusal.code);
    HttpError(refusal)
}

/// The dialog with the user of a path.
fn user(app: &App, path: &str) -> Result<Target, HttpError> {
    path.parse::<UserId>()
        .map(|user| Target::User(user.get()))
        .map_err(|e| counted(app, RequestError::from(e)))
}

/// Store a message in the dialog with `user`, and deliver it.
#[utoipa::path(
    post, path = "/v1/dialogs/{user}/messages", tag = "messages", request_body = SendRequest, params(("user" = u64, Path, description = "The other user", minimum = 1, maximum = 9_007_199_254_740_991_u64, example = 42)),
    responses(
        (status = 201, description = "Stored", body = Sent),
        (status = 200, description = "A repeat of a send that was stored before", body = Sent),
        (status = 409, description = "The key was used in this dialog for another text", body = ErrorBody),
        BodyRefusals, Refusals
    ),
    security(("bearer" = []))
)]
pub async fn send(
    Caller(me): Caller,
    path: web::Path<String>,
    body: web::Json<SendRequest>,
    app: web::Data<App>,
) -> Result<HttpResponse, HttpError> {
    sent(&app, me, user(&app, &path)?, body.into_inner()).await
}

/// Stores a message, and answers with its place.
pub(super) async fn sent(
    app: &App,
    me: UserId,
    to: Target,
    SendRequest { key, text }: SendRequest,
) -> Result<HttpResponse, HttpError> {
    let messages = &app.context.messages;
    let sending = messages.sending(me, Outgoing { to, key, text });
    let sending = sending.map_err(|e| counted(app, e))?;
    Ok(stored(&sending.await.map_err(|e| counted(app, e))?))
}

/// The answer to a request whose entry is stored.
pub(super) fn stored(sent: &messages::Sent) -> HttpResponse {
    let body = Sent {
        dialog: sent.dialog.to_string(),
        seq: sent.place.seq.get(),
        at: sent.place.at.to_string(),
    };
    if sent.repeat {
        HttpResponse::Ok().json(body)
    } else {
        HttpResponse::Created().json(body)
    }
}

/// Which part of a dialog.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub struct HistoryQuery {
    /// Messages with a smaller seq, the newest of them.
    #[param(minimum = 1, example = 120)]
    before: Option<u64>,
    /// Messages with a larger seq, the oldest of them.
    #[param(minimum = 0)]
    after: Option<u64>,
    /// The largest number; 50 by default. A larger value than the maximum of the server is lowered.
    #[param(minimum = 1, example = 50)]
    limit: Option<u32>,
}

/// A page of the dialog with `user`, ascending; the newest unless `before` or `after` is given.
#[utoipa::path(
    get, path = "/v1/dialogs/{user}/messages", tag = "messages", params(("user" = u64, Path, description = "The other user", minimum = 1, maximum = 9_007_199_254_740_991_u64, example = 42), HistoryQuery),
    responses((status = 200, description = "The page", body = HistoryPage), Refusals),
    security(("bearer" = []))
)]
pub async fn history(
    Caller(me): Caller,
    path: web::Path<String>,
    query: web::Query<HistoryQuery>,
    app: web::Data<App>,
) -> Result<web::Json<HistoryPage>, HttpError> {
    page_of(&app, me, &user(&app, &path)?, &query).await
}

/// A page of a dialog.
pub(super) async fn page_of(
    app: &App,
    me: UserId,
    of: &Target,
    query: &HistoryQuery,
) -> Result<web::Json<HistoryPage>, HttpError> {
    let page = async {
        let (dialog, range) = (of.dialog(me)?, range(query.before, query.after)?);
        let messages = &app.context.messages;
        messages.history(me, dialog, range, query.limit).await
    };
    Ok(web::Json(page.await.map_err(|e| counted(app, e))?))
}

/// Which page of an inbox.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub struct InboxQuery {
    /// The `cursor` of the page before.
    cursor: Option<String>,
    /// The largest number; 50 by default. A larger value than the maximum of the server is lowered.
    #[param(minimum = 1, example = 50)]
    limit: Option<u32>,
}

/// The dialogs of the token's user, newest first.
#[utoipa::path(
    get, path = "/v1/dialogs", tag = "messages", params(InboxQuery),
    responses((status = 200, description = "The page", body = InboxPage), Refusals),
    security(("bearer" = []))
)]
pub async fn inbox(
    Caller(me): Caller,
    query: web::Query<InboxQuery>,
    app: web::Data<App>,
) -> Result<web::Json<InboxPage>, HttpError> {
    let page = app
        .context
        .messages
        .inbox(me, query.limit, query.cursor.as_deref())
        .await
        .map_err(|e| counted(&app, e))?;
    Ok(web::Json(page))
}

/// Mark the dialog with `user` as read up to a seq: forward only, never beyond the last message.
#[utoipa::path(
    put, path = "/v1/dialogs/{user}/read", tag = "messages", request_body = ReadRequest, params(("user" = u64, Path, description = "The other user", minimum = 1, maximum = 9_007_199_254_740_991_u64, example = 42)),
    responses((status = 200, description = "The mark as it is now", body = ReadMark), BodyRefusals, Refusals),
    security(("bearer" = []))
)]
pub async fn mark_read(
    Caller(me): Caller,
    path: web::Path<String>,
    body: web::Json<ReadRequest>,
    app: web::Data<App>,
) -> Result<web::Json<ReadMark>, HttpError> {
    let with = user(&app, &path)?;
    let read = app
        .context
        .messages
        .mark_read(me, &with, body.seq)
        .await
        .map_err(|e| counted(&app, e))?;
    Ok(web::Json(read.wire(me)))
}

/// Whether `user` has a session on any instance.
#[utoipa::path(
    get, path = "/v1/users/{user}/presence", tag = "users", params(("user" = u64, Path, description = "The user", minimum = 1, maximum = 9_007_199_254_740_991_u64, example = 42)),
    responses((status = 200, description = "Whether the user has a session on any instance", body = Presence), Refusals),
    security(("bearer" = []))
)]
pub async fn presence(
    Caller(me): Caller,
    path: web::Path<String>,
    app: web::Data<App>,
) -> Result<web::Json<Presence>, HttpError> {
    let who: UserId = path
        .parse()
        .map_err(|e| counted(&app, RequestError::InvalidUserId(e)))?;
    let afforded = app.context.messages.afford(me, cost::STATEMENT);
    afforded.map_err(|e| counted(&app, e))?;
    let online = app.context.presence.ask(who).await;
    let online = online.ok_or_else(|| counted(&app, RequestError::Unavailable))?;
    Ok(web::Json(Presence {
        user: who.get(),
        online,
    }))
}

/// How long a token of embedded mode lasts.
const DEV_TOKEN_LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);

/// A token for anybody: in embedded mode on a loopback address only.
#[utoipa::path(
    post, path = "/v1/dev/token", tag = "development", request_body = DevTokenRequest,
    responses(
        (status = 200, description = "The token", body = Token),
        (status = 400, description = "Malformed", body = ErrorBody),
        (status = 403, description = "A page of another site, or a host that is not one of this service", body = ErrorBody),
        (status = 404, description = "Not in embedded mode", body = ErrorBody)
    ),
    security(())
)]
pub async fn dev_token(
    request: HttpRequest,
    body: web::Json<DevTokenRequest>,
    app: web::Data<App>,
) -> Result<web::Json<Token>, HttpError> {
    door::own_site(request.headers()).map_err(|refusal| counted(&app, refusal))?;
    if !app.dev_tokens {
        return Err(counted(
            &app,
            ApiError::new(
                ErrorCode::NotFound,
                "tokens are minted here in embedded mode only",
            ),
        ));
    }
    let user = UserId::new(body.user).map_err(|e| counted(&app, RequestError::from(e)))?;
    let minted = app.tokens.mint(user, DEV_TOKEN_LIFETIME);
    let token =
        minted.map_err(|e| counted(&app, ApiError::new(ErrorCode::Internal, e.to_string())))?;
    Ok(web::Json(Token { token }))
}
