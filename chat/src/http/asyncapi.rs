//! The description of the WebSocket, as `/docs` is that of REST: AsyncAPI 3, made from the types of
//! the frames.

use actix_web::HttpResponse;
use chat_wire::{ClientFrame, Close, PROTOCOL, ServerFrame};
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
    let mut add = |side: &str, frames: Vec<(String, Value)>| -> Vec<String> {
        let named = frames.into_iter().map(|(kind, payload)| {
            let name = format!("{side}_{kind}");
            let summary = payload["description"].clone();
            messages.insert(
                name,
                json!({"name": kind, "summary": summary, "payload": payload}),
            );
            kind
        });
        named.collect()
    };
    let (client, server) = (add("client", from_client), add("server", to_client));
    let of_channel: Map<String, Value> = messages
        .keys()
        .map(|name| {
            let message = json!({"$ref": format!("#/components/messages/{name}")});
            (name.clone(), message)
        })
        .collect();
    // Said from the server's side, as the standard wants it.
    let channel = json!({"$ref": "#/channels/session"});
    let message = |name: String| json!({"$ref": format!("#/channels/session/messages/{name}")});
    let mut operations = Map::new();
    for kind in client {
        let answers = [answer(&kind), "error"].map(|kind| message(format!("server_{kind}")));
        operations.insert(
            format!("receive_{kind}"),
            json!({
                "action": "receive",
                "channel": channel,
                "description": described(&messages[&format!("client_{kind}")]),
                "messages": [message(format!("client_{kind}"))],
                "reply": {"channel": channel, "messages": answers},
            }),
        );
    }
    let events = server
        .into_iter()
        .filter(|kind| EVENTS.contains(&kind.as_str()));
    let events: Vec<Value> = events
        .map(|kind| message(format!("server_{kind}")))
        .collect();
    operations.insert(
        "send_events".to_owned(),
        json!({
            "action": "send",
            "channel": channel,
            "description": "What a session receives without a request.",
            "messages": events,
        }),
    );
    json!({
        "asyncapi": "3.0.0",
        "info": {
            "title": "chat",
            "version": PROTOCOL,
            "description": "JSON text frames, one object each; `type` is its kind. docs/PROTOCOL.md explains the protocol.",
            "license": {"name": "MIT OR Apache-2.0"}
        },
        "defaultContentType": "application/json",
        "servers": {"instance": {
            "host": "{host}",
            "protocol": "wss",
            "description": "An instance; ws without TLS",
            "variables": {"host": {"default": "localhost:8080", "description": "Host and port"}},
            "security": [{"$ref": "#/components/securitySchemes/bearer"}]
        }},
        "channels": {"session": {
            "address": "/v1/ws",
            "description": format!("A WebSocket with the subprotocol {PROTOCOL}. {}", close_codes()),
            "servers": [{"$ref": "#/servers/instance"}],
            "messages": of_channel,
            "bindings": {"ws": {
                "method": "GET",
                "query": {"type": "object", "properties": {"since": {
                    "type": "string",
                    "format": "date-time",
                    "description": "After a reconnection: the `since` of the `resume` that follows"
                }}},
                "bindingVersion": "0.1.0"
            }}
        }},
        "operations": operations,
        "components": {
            "messages": messages,
            "schemas": schemas,
            "securitySchemes": {"bearer": {
                "type": "http",
                "scheme": "bearer",
                "bearerFormat": "JWT",
                "description": "Authorization: Bearer, or in a browser the second subprotocol bearer.JWT"
            }}
        }
    })
}

/// The frames that a session receives without a request.
const EVENTS: [&str; 8] = [
    "welcome", "message", "entry", "resumed", "read", "typing", "presence", "error",
];

/// What a message is.
fn described(message: &Value) -> Value {
    message["summary"].clone()
}

/// The kind of the frame that answers a request.
fn answer(request: &str) -> &'static str {
    match request {
        "send" => "sent",
        "create" => "created",
        "history" => "history",
        "inbox" => "inbox",
        "resume" => "resumed",
        "auth" => "authenticated",
        "ping" => "pong",
        _ => "done",
    }
}

fn close_codes() -> String {
    let codes = Close::ALL.map(|close| format!("{} {}", close.code(), close.reason()));
    format!("Close codes: {}.", codes.join(", "))
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
