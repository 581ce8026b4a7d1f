//! The description of the WebSocket, as `/docs` is that of REST: AsyncAPI 3, made from the types of
//! the frames.

use actix_web::HttpResponse;
use chat_wire::{ClientFrame, PROTOCOL, ServerFrame};
use serde_json::{Map, Value, json};
use utoipa::{PartialSchema, ToSchema};

/// `/v1/asyncapi.json`
pub async fn asyncapi() -> HttpResponse {
    HttpResponse::Ok().json(document())
}

/// The document. `docs/asyncapi.json` is a copy of it.
#[must_use]
pub fn document() -> Value {
    let mut schemas = Vec::new();
    ClientFrame::schemas(&mut schemas);
    ServerFrame::schemas(&mut schemas);
    let schemas: Map<String, Value> = schemas
        .into_iter()
        .map(|(name, schema)| (name, json!(schema)))
        .collect();
    let (from_client, to_client) = (
        frames(&json!(ClientFrame::schema())),
        frames(&json!(ServerFrame::schema())),
    );
    let mut messages = Map::new();
    let mut operation = |action: &str, side: &str, frames: Vec<(String, Value)>| {
        let mut names = Vec::new();
        for (kind, payload) in frames {
            let name = format!("{side}_{kind}");
            let summary = payload["description"].clone();
            names.push(json!({"$ref": format!("#/channels/session/messages/{name}")}));
            messages.insert(
                name,
                json!({"name": kind, "summary": summary, "payload": payload}),
            );
        }
        json!({"action": action, "channel": {"$ref": "#/channels/session"}, "messages": names})
    };
    // Said from the server's side, as the standard wants it.
    let receive = operation("receive", "client", from_client);
    let send = operation("send", "server", to_client);
    let of_channel: Map<String, Value> = messages
        .keys()
        .map(|name| {
            let message = json!({"$ref": format!("#/components/messages/{name}")});
            (name.clone(), message)
        })
        .collect();
    json!({
        "asyncapi": "3.0.0",
        "info": {
            "title": "chat",
            "version": PROTOCOL,
            "description": "JSON text frames, one object each; `type` is its kind. docs/PROTOCOL.md explains the protocol."
        },
        "defaultContentType": "application/json",
        "channels": {"session": {
            "address": "/v1/ws",
            "description": "A WebSocket with the subprotocol chat.v1, and a bearer token",
            "messages": of_channel,
            "bindings": {"ws": {"method": "GET"}}
        }},
        "operations": {"receive": receive, "send": send},
        "components": {"messages": messages, "schemas": schemas}
    })
}

/// The kinds of a frame, by `type`, with their schemas.
fn frames(schema: &Value) -> Vec<(String, Value)> {
    let variants = schema["oneOf"].as_array().cloned().unwrap_or_default();
    let named = variants.into_iter().filter_map(|variant| {
        let own = variant["allOf"].as_array().into_iter().flatten();
        let kind = std::iter::once(&variant)
            .chain(own)
            .find_map(|part| part["properties"]["type"]["enum"][0].as_str())?
            .to_owned();
        Some((kind, variant))
    });
    named.collect()
}
