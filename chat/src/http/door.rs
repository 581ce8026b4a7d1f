//! What every request passes before it is looked at, from the cheapest check on: the host that it
//! names, the site of the page that sends it, the token of an operator, and the time that it may
//! take. Connections are counted before, where they are accepted.

use super::{App, HttpError};
use crate::audit;
use crate::config::{is_allowed_host, normalized_origin};
use crate::error::ApiError;
use actix_web::body::{EitherBody, MessageBody};
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::http::Method;
use actix_web::http::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderMap, HeaderName, ORIGIN};
use actix_web::middleware::Next;
use actix_web::{Error, ResponseError, web};
use chat_wire::ErrorCode;
use std::time::Duration;
use tokio::time::timeout;

/// The door for clients.
pub async fn clients<B: MessageBody>(
    app: web::Data<App>,
    request: ServiceRequest,
    next: Next<B>,
) -> Result<ServiceResponse<EitherBody<B>>, Error> {
    let allowed = host(request.headers(), &app.allowed_hosts);
    pass("http", allowed, &app, request, next).await
}

/// The door for operators. Health is for everybody.
pub async fn operators<B: MessageBody>(
    app: web::Data<App>,
    request: ServiceRequest,
    next: Next<B>,
) -> Result<ServiceResponse<EitherBody<B>>, Error> {
    let headers = request.headers();
    let health = matches!(request.path(), "/livez" | "/readyz");
    let allowed = host(headers, &app.allowed_hosts)
        .and_then(|()| own_site(headers))
        .and_then(|()| {
            if health {
                Ok(())
            } else {
                operator(headers, &app)
            }
        })
        .and_then(|()| no_form(request.method(), headers));
    pass("admin", allowed, &app, request, next).await
}

async fn pass<B: MessageBody>(
    door: &'static str,
    allowed: Result<(), ApiError>,
    app: &App,
    request: ServiceRequest,
    next: Next<B>,
) -> Result<ServiceResponse<EitherBody<B>>, Error> {
    if let Err(refusal) = allowed {
        app.context.metrics.error(refusal.code);
        let address = app.address_of(request.request());
        audit::refused(door, address, refusal.code, &refusal.message);
        let answer = HttpError(refusal).error_response();
        return Ok(request.into_response(answer).map_into_right_body());
    }
    // A body that does not come, or an answer that does not. A WebSocket is answered at once.
    let limit = Duration::from_millis(app.context.limits.request_ms);
    match timeout(limit, next.call(request)).await {
        Ok(answer) => Ok(answer?.map_into_left_body()),
        Err(_) => {
            app.context.metrics.error(ErrorCode::RequestTimeout);
            let message = format!("not answered within {} s", limit.as_secs_f64());
            Err(HttpError(ApiError::new(ErrorCode::RequestTimeout, message)).into())
        }
    }
}

/// The host must be one of this service. HTTP/1.0 need not name one; browsers always do.
fn host(headers: &HeaderMap, allowed: &[String]) -> Result<(), ApiError> {
    let Some(host) = headers.get(HOST) else {
        return Ok(());
    };
    let is_ours = host
        .to_str()
        .is_ok_and(|host| is_allowed_host(host, allowed));
    if is_ours {
        return Ok(());
    }
    Err(ApiError::new(
        ErrorCode::Forbidden,
        "this host is not one of allowed_hosts",
    ))
}

/// Whether `Origin` is the one of the host that the request names.
pub fn is_own_origin(headers: &HeaderMap, origin: &str) -> bool {
    let host = headers.get(HOST).and_then(|host| host.to_str().ok());
    // The scheme of our own is not known behind a proxy.
    let own = |scheme| host.and_then(|host| normalized_origin(&format!("{scheme}://{host}")));
    let schemes = ["http", "https"];
    schemes
        .iter()
        .any(|scheme| own(scheme).as_deref() == Some(origin))
}

/// A page of another site cannot act here with the network position of its reader.
///
/// # Errors
/// [`ApiError`] with `forbidden`, if a browser says that the request is from another site.
pub fn own_site(headers: &HeaderMap) -> Result<(), ApiError> {
    let text = |name: HeaderName| headers.get(name).map(|value| value.to_str().unwrap_or(""));
    let site = text(HeaderName::from_static("sec-fetch-site"));
    let own_site = site.is_none_or(|site| matches!(site, "same-origin" | "none"));
    let own_origin = text(ORIGIN).is_none_or(|origin| {
        let origin = normalized_origin(origin);
        origin.is_some_and(|origin| is_own_origin(headers, &origin))
    });
    if own_site && own_origin {
        return Ok(());
    }
    Err(ApiError::new(
        ErrorCode::Forbidden,
        "pages of other sites may not do this",
    ))
}

/// Checks the admin token, if one is set. Without one the listener is on loopback only.
fn operator(headers: &HeaderMap, app: &App) -> Result<(), ApiError> {
    let Some(expected) = &app.admin_token else {
        return Ok(());
    };
    let given = headers.get(AUTHORIZATION);
    let given = given
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.strip_prefix("Bearer "))
        .unwrap_or_default();
    // In constant time: as many comparisons whatever is given.
    let same = given.len() == expected.expose().len()
        && given
            .bytes()
            .zip(expected.expose().bytes())
            .fold(0, |difference, (a, b)| difference | (a ^ b))
            == 0;
    if same {
        return Ok(());
    }
    Err(ApiError::new(
        ErrorCode::Unauthenticated,
        "send the admin token as Authorization: Bearer",
    ))
}

/// What a form of any page can send is not taken: a POST needs a token, or a type that no form has.
fn no_form(method: &Method, headers: &HeaderMap) -> Result<(), ApiError> {
    const OF_FORMS: [&str; 3] = [
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "text/plain",
    ];
    let kind = headers
        .get(CONTENT_TYPE)
        .and_then(|kind| kind.to_str().ok());
    let kind = kind.map(|kind| kind.split(';').next().unwrap_or(kind).trim().to_lowercase());
    let no_form = kind.is_some_and(|kind| !kind.is_empty() && !OF_FORMS.contains(&kind.as_str()));
    if method != Method::POST || headers.contains_key(AUTHORIZATION) || no_form {
        return Ok(());
    }
    Err(ApiError::new(
        ErrorCode::BadRequest,
        "send Content-Type: application/json, or application/toml for a shards.toml",
    ))
}
