//! For operators, on a listener of its own.

use super::{ApiError, App};
use crate::change::Status;
use crate::change::install::NotInForce;
use crate::change::plan::Plan;
use crate::dialog::{DialogId, UserId};
use crate::messages::NotDone;
use crate::ownership::SlotState;
use crate::refusal::Refusal;
use crate::ring::{SLOTS, Slot};
use crate::store::ShardState;
use crate::topology::Topology;
use actix_web::http::header::AUTHORIZATION;
use actix_web::{HttpRequest, HttpResponse, web};
use chat_wire::ErrorCode;
use futures_util::future::join_all;
use serde_json::{Value, json};
use std::time::Duration;

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
    let view = app.context.messages.cluster().view();
    let file = app.change.status().file;
    Ok(web::Json(json!({
        "version": view.doc.version,
        "phase": view.doc.phase.as_str(),
        "hash": view.doc.hash,
        "document": view.document,
        "file": file,
    })))
}

/// Every shard: whether it answers, and its share. Counts its rows: not to be asked every second.
pub async fn shards(
    request: HttpRequest,
    app: web::Data<App>,
) -> Result<web::Json<Value>, ApiError> {
    operator(&request, &app)?;
    let view = app.context.messages.cluster().view();
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
    let shards = join_all(view.shards.iter().map(describe)).await;
    Ok(web::Json(
        json!({ "shards": shards, "not_in_our_file": view.strangers().collect::<Vec<_>>() }),
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
        "owner": cluster.known_owner(slot).map(|shard| shard.name().to_owned()),
        "wanted": cluster.view().wanted(slot),
    })))
}

/// How a change of the shard set stands.
pub async fn change(
    request: HttpRequest,
    app: web::Data<App>,
) -> Result<web::Json<Status>, ApiError> {
    operator(&request, &app)?;
    Ok(web::Json(app.change.status()))
}

/// What a `shards.toml`, which is the body, would do.
pub async fn plan(
    request: HttpRequest,
    app: web::Data<App>,
    text: String,
) -> Result<web::Json<Plan>, ApiError> {
    operator(&request, &app)?;
    let env = |name: &str| std::env::var(name).ok();
    let refused = |what: String| Refusal::new(ErrorCode::BadRequest, what);
    let file = Topology::parse(&text, &env).map_err(|e| refused(e.to_string()))?;
    Ok(web::Json(app.change.plan(&file).await.map_err(refused)?))
}

/// Halts all moves, for all instances.
pub async fn pause(
    request: HttpRequest,
    app: web::Data<App>,
) -> Result<web::Json<Status>, ApiError> {
    set_paused(&request, &app, true).await
}

/// Lets moves go on.
pub async fn resume(
    request: HttpRequest,
    app: web::Data<App>,
) -> Result<web::Json<Status>, ApiError> {
    set_paused(&request, &app, false).await
}

async fn set_paused(
    request: &HttpRequest,
    app: &App,
    paused: bool,
) -> Result<web::Json<Status>, ApiError> {
    operator(request, app)?;
    let not_done = |e: NotInForce| Refusal::new(ErrorCode::Unavailable, e.to_string());
    app.change.pause(paused).await.map_err(not_done)?;
    Ok(web::Json(app.change.status()))
}

/// The slots of every shard, by state.
pub async fn slots(
    request: HttpRequest,
    app: web::Data<App>,
) -> Result<web::Json<Value>, ApiError> {
    operator(&request, &app)?;
    let view = app.context.messages.cluster().view();
    let describe = |shard: &crate::store::Shard| {
        let shard = shard.clone();
        async move {
            let rows = shard
                .ask(|store, identity| async move { store.rows(&identity, None, None).await })
                .await;
            let leftovers =
                shard
                    .ask(|store, identity| async move {
                        store.leftovers(&identity, Duration::ZERO).await
                    })
                    .await;
            match rows.and_then(|rows| Ok((rows, leftovers?))) {
                Err(e) => json!({ "name": shard.name(), "reason": e.to_string() }),
                Ok((rows, leftovers)) => {
                    let count = |state| rows.iter().filter(|row| row.state == state).count();
                    json!({
                        "name": shard.name(),
                        "owner": count(SlotState::Owner),
                        "sealed": count(SlotState::Sealed),
                        "incoming": count(SlotState::Incoming),
                        "fenced": count(SlotState::Fenced),
                        "incomplete": rows.iter().filter(|row| !row.history.is_complete()).count(),
                        "to_purge": leftovers.len(),
                    })
                }
            }
        }
    };
    let mut shards = join_all(view.shards.iter().map(describe)).await;
    let down = view
        .document
        .down()
        .map(|name| json!({ "name": name, "reason": "declared down" }));
    shards.extend(down);
    Ok(web::Json(json!({ "shards": shards })))
}
