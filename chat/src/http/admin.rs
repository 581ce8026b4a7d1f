//! For operators, on a listener of its own.

use super::{App, HttpError};
use crate::domain::dialog::{DialogId, UserId};
use crate::domain::ownership::SlotState;
use crate::domain::shards_file::ShardsFile;
use crate::domain::slot::{SLOTS, Slot};
use crate::error::ApiError;
use crate::messages::RequestError;
use crate::resharding::Status;
use crate::resharding::estimate::Plan;
use crate::resharding::install::InstallError;
use crate::store::Health;
use actix_web::http::header::AUTHORIZATION;
use actix_web::{HttpRequest, HttpResponse, web};
use chat_wire::ErrorCode;
use futures_util::future::join_all;
use serde_json::{Value, json};

/// Checks the admin token, if one is set. Without one the listener is on loopback only.
fn operator(request: &HttpRequest, app: &App) -> Result<(), HttpError> {
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
        Err(ApiError::new(
            ErrorCode::Unauthenticated,
            "send the admin token as Authorization: Bearer",
        ))?
    }
}

/// The metrics.
pub async fn metrics(request: HttpRequest, app: web::Data<App>) -> Result<HttpResponse, HttpError> {
    operator(&request, &app)?;
    let text = app.context.metrics.encode();
    Ok(HttpResponse::Ok()
        .content_type("application/openmetrics-text; version=1.0.0; charset=utf-8")
        .body(text))
}

/// The topology in effect, and the state of this instance's `shards.toml` relative to it.
pub async fn topology(
    request: HttpRequest,
    app: web::Data<App>,
) -> Result<web::Json<Value>, HttpError> {
    operator(&request, &app)?;
    let view = app.context.messages.cluster().view();
    let file = app.resharding.status().file;
    Ok(web::Json(json!({
        "version": view.topology_ref.version,
        "phase": view.topology_ref.phase.as_str(),
        "hash": view.topology_ref.hash,
        "topology": view.topology,
        "file": file,
    })))
}

/// Every shard: whether it answers, and its share. Counts all rows: not for every second.
pub async fn shards(
    request: HttpRequest,
    app: web::Data<App>,
) -> Result<web::Json<Value>, HttpError> {
    operator(&request, &app)?;
    let view = app.context.messages.cluster().view();
    let describe = |shard: &crate::store::Shard| {
        let shard = shard.clone();
        async move {
            let counts = shard.counts().await.ok();
            let reason = match shard.state() {
                Health::Reachable => None,
                Health::Unreachable(reason) => Some(reason),
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
        json!({ "shards": shards, "unconfigured": view.unconfigured().collect::<Vec<_>>() }),
    ))
}

/// The slot, owner and target shard of the dialog of two users.
pub async fn locate(
    request: HttpRequest,
    path: web::Path<(String, String)>,
    app: web::Data<App>,
) -> Result<web::Json<Value>, HttpError> {
    operator(&request, &app)?;
    let (a, b) = path.into_inner();
    let user = |text: &str| {
        text.parse::<UserId>()
            .map_err(|e| HttpError::from(RequestError::from(e)))
    };
    let dialog = DialogId::between(user(&a)?, user(&b)?);
    let slot = Slot::of(dialog);
    let cluster = app.context.messages.cluster();
    // The owner that this instance remembers may be an earlier one, as long as nothing was sent
    // there.
    cluster.find(slot).await;
    Ok(web::Json(json!({
        "dialog": dialog.to_string(),
        "slot": slot.get(),
        "slots": SLOTS,
        "owner": cluster.known_owner(slot).map(|shard| shard.name().to_owned()),
        "target": cluster.view().target(slot),
    })))
}

/// The state of resharding.
pub async fn resharding(
    request: HttpRequest,
    app: web::Data<App>,
) -> Result<web::Json<Status>, HttpError> {
    operator(&request, &app)?;
    Ok(web::Json(app.resharding.status()))
}

/// What the `shards.toml` in the body would do.
pub async fn plan(
    request: HttpRequest,
    app: web::Data<App>,
    text: String,
) -> Result<web::Json<Plan>, HttpError> {
    operator(&request, &app)?;
    let env = |name: &str| std::env::var(name).ok();
    let refused = |what: String| ApiError::new(ErrorCode::BadRequest, what);
    let file = ShardsFile::parse(&text, &env).map_err(|e| refused(e.to_string()))?;
    Ok(web::Json(
        app.resharding.plan(&file).await.map_err(refused)?,
    ))
}

/// Pauses rebalancing, for all instances.
pub async fn pause(
    request: HttpRequest,
    app: web::Data<App>,
) -> Result<web::Json<Status>, HttpError> {
    set_paused(&request, &app, true).await
}

/// Resumes rebalancing.
pub async fn resume(
    request: HttpRequest,
    app: web::Data<App>,
) -> Result<web::Json<Status>, HttpError> {
    set_paused(&request, &app, false).await
}

async fn set_paused(
    request: &HttpRequest,
    app: &App,
    paused: bool,
) -> Result<web::Json<Status>, HttpError> {
    operator(request, app)?;
    let not_done = |e: InstallError| ApiError::new(ErrorCode::Unavailable, e.to_string());
    app.resharding.pause(paused).await.map_err(not_done)?;
    Ok(web::Json(app.resharding.status()))
}

/// The slots of every shard, by state.
pub async fn slots(
    request: HttpRequest,
    app: web::Data<App>,
) -> Result<web::Json<Value>, HttpError> {
    operator(&request, &app)?;
    let view = app.context.messages.cluster().view();
    let describe = |shard: &crate::store::Shard| {
        let shard = shard.clone();
        async move {
            match shard.slot_rows().await {
                Err(e) => json!({ "name": shard.name(), "reason": e.to_string() }),
                Ok((rows, to_purge)) => {
                    let count = |state| rows.iter().filter(|row| row.state == state).count();
                    json!({
                        "name": shard.name(),
                        "owner": count(SlotState::Owner),
                        "sealed": count(SlotState::Sealed),
                        "incoming": count(SlotState::Incoming),
                        "fenced": count(SlotState::Fenced),
                        "incomplete": rows.iter().filter(|row| !row.history.is_complete()).count(),
                        "to_purge": to_purge.len(),
                    })
                }
            }
        }
    };
    let mut shards = join_all(view.shards.iter().map(describe)).await;
    let down = view
        .topology
        .down()
        .map(|name| json!({ "name": name, "reason": "declared down" }));
    shards.extend(down);
    Ok(web::Json(json!({ "shards": shards })))
}
