//! For operators, on a listener of its own.

use super::{App, HttpError};
use crate::audit;
use crate::clock;
use crate::cluster::Unstored;
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
use actix_web::http::header::{Accept, VARY};
use actix_web::{HttpRequest, HttpResponse, web};
use chat_wire::ErrorCode;
use futures_util::future::join_all;
use serde::Deserialize;
use serde_json::{Value, json};

/// The metrics: as OpenMetrics, or in the older format for a client that prefers `text/plain`.
pub async fn metrics(
    app: web::Data<App>,
    accept: Option<web::Header<Accept>>,
) -> Result<HttpResponse, HttpError> {
    let older = accept.is_some_and(|accept| {
        let known = ["application/openmetrics-text", "text/plain"];
        let ranked = accept.ranked();
        let preferred = ranked
            .iter()
            .find(|kind| known.contains(&kind.essence_str()));
        preferred.is_some_and(|kind| kind.essence_str() == "text/plain")
    });
    let metrics = &app.context.metrics;
    let (kind, text) = if older {
        (
            "text/plain; version=0.0.4; charset=utf-8",
            metrics.encode_prometheus(),
        )
    } else {
        (
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
            metrics.encode(),
        )
    };
    Ok(HttpResponse::Ok()
        .content_type(kind)
        .insert_header((VARY, "Accept"))
        .body(text))
}

/// The topology in effect, and the state of this instance's `shards.toml` relative to it.
pub async fn topology(app: web::Data<App>) -> Result<web::Json<Value>, HttpError> {
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
pub async fn shards(app: web::Data<App>) -> Result<web::Json<Value>, HttpError> {
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
    path: web::Path<(String, String)>,
    app: web::Data<App>,
) -> Result<web::Json<Value>, HttpError> {
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
pub async fn resharding(app: web::Data<App>) -> Result<web::Json<Status>, HttpError> {
    Ok(web::Json(app.resharding.status()))
}

/// What the `shards.toml` in the body would do.
pub async fn plan(app: web::Data<App>, text: String) -> Result<web::Json<Plan>, HttpError> {
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
    let not_done = |e: InstallError| ApiError::new(ErrorCode::Unavailable, e.to_string());
    app.resharding.pause(paused).await.map_err(not_done)?;
    let act = if paused { "pause" } else { "resume" };
    audit::act(act, app.address_of(request), "resharding");
    Ok(web::Json(app.resharding.status()))
}

fn user_of(path: &str) -> Result<UserId, HttpError> {
    path.parse::<UserId>()
        .map_err(|e| HttpError::from(RequestError::from(e)))
}

/// What is known of a user: the sessions here, and since when tokens count.
pub async fn user(
    path: web::Path<String>,
    app: web::Data<App>,
) -> Result<web::Json<Value>, HttpError> {
    let user = user_of(&path)?;
    Ok(web::Json(json!({
        "user": user.get(),
        "sessions": app.context.delivery.registry().sessions_of(user),
        "issued_before": app.revocations.issued_before(user),
    })))
}

/// Ends the sessions of a user on all instances.
pub async fn disconnect(
    request: HttpRequest,
    path: web::Path<String>,
    app: web::Data<App>,
) -> Result<web::Json<Value>, HttpError> {
    let user = user_of(&path)?;
    app.revocations.disconnect(user);
    audit::act(
        "disconnect",
        app.address_of(&request),
        &format!("user {user}"),
    );
    Ok(web::Json(json!({ "user": user.get() })))
}

/// What to revoke.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Revocation {
    /// Tokens issued before this time, in seconds since 1970; before now if it is left out.
    issued_before: Option<u64>,
}

/// Refuses the tokens of a user that were issued before a time, and ends the sessions that have
/// one.
pub async fn revoke(
    request: HttpRequest,
    path: web::Path<String>,
    body: web::Bytes,
    app: web::Data<App>,
) -> Result<web::Json<Value>, HttpError> {
    let user = user_of(&path)?;
    let asked: Revocation = if body.is_empty() {
        Revocation::default()
    } else {
        let refused = |e: serde_json::Error| ApiError::new(ErrorCode::BadRequest, e.to_string());
        serde_json::from_slice(&body).map_err(refused)?
    };
    // A token of this very second is one of before.
    let now = u64::try_from(clock::now().micros()).unwrap_or(0) / 1_000_000 + 1;
    let before = asked.issued_before.unwrap_or(now);
    if before > now {
        let message = "issued_before is in the future: every token until then would be refused";
        return Err(ApiError::new(ErrorCode::BadRequest, message).into());
    }
    let unstored = |e: Unstored| ApiError::new(ErrorCode::Unavailable, e.to_string());
    let missing = app
        .revocations
        .revoke(user, before)
        .await
        .map_err(unstored)?;
    let on = format!("user {user}, tokens issued before {before}");
    audit::act("revoke", app.address_of(&request), &on);
    Ok(web::Json(json!({
        "user": user.get(),
        "issued_before": before,
        "not_yet_on": missing,
    })))
}

/// The slots of every shard, by state.
pub async fn slots(app: web::Data<App>) -> Result<web::Json<Value>, HttpError> {
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
