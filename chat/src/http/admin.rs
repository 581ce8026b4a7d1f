//! For operators, on a listener of its own.

use super::{ApiError, App};
use crate::dialog::{DialogId, UserId};
use crate::messages::NotDone;
use crate::refusal::Refusal;
use crate::ring::{SLOTS, Slot};
use crate::store::ShardState;
use actix_web::http::header::AUTHORIZATION;
use actix_web::{HttpRequest, HttpResponse, web};
use chat_wire::ErrorCode;
use futures_util::future::join_all;
use serde_json::{Value, json};

/// Asks for the admin token where one is set; on loopback none need be.
fn operator(request: &HttpRequest, app: &App) -> Result<(), ApiError> {
    let Some(expected) = &app.admin_token else {
        return Ok(());
    };
    let given = request
        .headers()
        .get(AUTHORIZATION)
        .and_then(|value| value.to_str().ok());
    let given = given
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
        Ok(())
    } else {
        Err(Refusal::new(
            ErrorCode::Unauthenticated,
            "send the admin token as Authorization: Bearer",
        ))?
    }
}

/// What Prometheus reads.
pub async fn metrics(request: HttpRequest, app: web::Data<App>) -> Result<HttpResponse, ApiError> {
    operator(&request, &app)?;
    let text = app.context.metrics.encode();
    Ok(HttpResponse::Ok()
        .content_type("application/openmetrics-text; version=1.0.0; charset=utf-8")
        .body(text))
}

/// The document in force, and how this instance's `shards.toml` stands to it.
pub async fn topology(
    request: HttpRequest,
    app: web::Data<App>,
) -> Result<web::Json<Value>, ApiError> {
    operator(&request, &app)?;
    let (version, document) = app.context.messages.cluster().document();
    let file = app.file.borrow().clone();
    Ok(web::Json(
        json!({ "version": version, "hash": document.hash(), "document": document, "file": file }),
    ))
}

/// Every shard: whether it answers, and its share. Counts its rows: not to be asked every second.
pub async fn shards(
    request: HttpRequest,
    app: web::Data<App>,
) -> Result<web::Json<Value>, ApiError> {
    operator(&request, &app)?;
    let cluster = app.context.messages.cluster();
    let describe = |shard: &crate::store::Shard| {
        let shard = shard.clone();
        async move {
            let counts = shard.counts().await.ok();
            let reason = match shard.state() {
                ShardState::Up => None,
                ShardState::Down(reason) => Some(reason),
            };
            json!({
                "name": shard.name(),
                "up": reason.is_none(),
                "reason": reason,
                "slots": counts.map(|counts| counts.slots),
                "dialogs": counts.map(|counts| counts.dialogs),
                "messages": counts.map(|counts| counts.messages),
            })
        }
    };
    let shards = join_all(cluster.shards().iter().map(describe)).await;
    Ok(web::Json(
        json!({ "shards": shards, "not_in_our_file": cluster.strangers().collect::<Vec<_>>() }),
    ))
}

/// Where the dialog of two users lies.
pub async fn place(
    request: HttpRequest,
    path: web::Path<(String, String)>,
    app: web::Data<App>,
) -> Result<web::Json<Value>, ApiError> {
    operator(&request, &app)?;
    let (a, b) = path.into_inner();
    let user = |text: &str| {
        text.parse::<UserId>()
            .map_err(|e| ApiError::from(NotDone::from(e)))
    };
    let dialog = DialogId::between(user(&a)?, user(&b)?);
    let slot = Slot::of(dialog);
    let cluster = app.context.messages.cluster();
    Ok(web::Json(json!({
        "dialog": dialog.to_string(),
        "slot": slot.get(),
        "slots": SLOTS,
        "owner": cluster.known_owner(slot).map(crate::store::Shard::name),
        "wanted": cluster.wanted(slot),
    })))
}
