//! Whether the instance lives, and whether it is of use.

use super::App;
use crate::bus::BusState;
use actix_web::{HttpResponse, web};
use serde_json::json;
use std::sync::atomic::Ordering;

/// The process answers.
pub async fn live() -> &'static str {
    "ok\n"
}

/// Whether clients should be sent here: not while draining, nor without any usable shard.
/// `degraded` says that it is of use but something is missing.
pub async fn ready(app: web::Data<App>) -> HttpResponse {
    let mut reasons = Vec::new();
    let view = app.context.messages.cluster().view();
    let shards = &view.shards;
    let down: Vec<&str> = shards
        .iter()
        .filter(|shard| shard.is_down())
        .map(|shard| shard.name())
        .collect();
    reasons.extend(down.iter().map(|name| format!("{name} does not answer")));
    if app.context.delivery.bus() == BusState::Disconnected {
        reasons.push(
            "NATS is disconnected: messages sent on one instance do not appear at once on the others"
                .to_owned(),
        );
    }
    if app.resharding.is_unconnected() {
        reasons.push("another instance uses these shards, but nats.url is not set here".to_owned());
    }
    let draining = app.draining.load(Ordering::Relaxed);
    if draining {
        reasons.push("going away".to_owned());
    }
    let ready = !draining && down.len() < shards.len();
    let status = match (ready, reasons.is_empty()) {
        (false, _) => "not ready",
        (true, false) => "degraded",
        (true, true) => "ok",
    };
    let body = json!({ "ready": ready, "status": status, "reasons": reasons });
    if ready {
        HttpResponse::Ok().json(body)
    } else {
        HttpResponse::ServiceUnavailable().json(body)
    }
}
