//! The REST API of rooms.

use super::rest::{BodyRefusals, Caller, HistoryQuery, Refusals, counted, page_of, sent, stored};
use super::{App, HttpError};
use crate::messages::{Done, RequestError, Target};
use actix_web::{HttpResponse, web};
use chat_wire::{
    ChangeRoomRequest, CreateRoomRequest, ErrorBody, HistoryPage, ReadMark, ReadRequest, Room,
    RoomMembersPage, SendRequest, Sent,
};
use serde::Deserialize;
use tokio::sync::oneshot;
use utoipa::IntoParams;

/// A room that the user may not use.
#[derive(utoipa::IntoResponses)]
#[allow(dead_code)] // for the description only
enum RoomRefusals {
    /// `not_member`: the user is not in the room; `forbidden`: the user's role does not allow it.
    #[response(status = 403)]
    NotMember(ErrorBody),
    /// There is no such room.
    #[response(status = 404)]
    NoRoom(ErrorBody),
}

/// Waits until a request for an entry is settled.
async fn settled(
    app: &App,
    submit: impl FnOnce(Box<dyn FnOnce(Result<Done, RequestError>) + Send>) -> Result<(), RequestError>,
) -> Result<Done, HttpError> {
    let (done, settling) = oneshot::channel();
    // The caller may have been dropped.
    let answer = Box::new(move |outcome| drop(done.send(outcome)));
    submit(answer).map_err(|e| counted(app, e))?;
    let outcome = settling.await.unwrap_or(Err(RequestError::Unavailable));
    outcome.map_err(|e| counted(app, e))
}

fn answer(done: Done) -> HttpResponse {
    match done {
        Done::Stored(entry) => stored(&entry),
        Done::Unchanged => HttpResponse::NoContent().finish(),
    }
}

/// Make a room, with the user as its owner. The same user and key name the same room.
#[utoipa::path(
    post, path = "/v1/rooms", operation_id = "create_room", tag = "rooms", request_body = CreateRoomRequest,
    responses(
        (status = 201, description = "Made; `dialog` is the id of the room", body = Sent),
        (status = 200, description = "A repeat of a request that was carried out before", body = Sent),
        (status = 409, description = "The key was used for another request (`key_reused`), or there are too many members (`room_full`)", body = ErrorBody),
        BodyRefusals, Refusals
    ),
    security(("bearer" = []))
)]
pub async fn create(
    Caller(me): Caller,
    body: web::Json<CreateRoomRequest>,
    app: web::Data<App>,
) -> Result<HttpResponse, HttpError> {
    let messages = &app.context.messages;
    let done = settled(&app, |answer| {
        messages.create_room(me, body.into_inner(), answer)
    });
    Ok(answer(done.await?))
}

/// A room, as a member sees it.
#[utoipa::path(
    get, path = "/v1/rooms/{room}", operation_id = "room", tag = "rooms", params(("room" = String, Path, description = "The id of the room")),
    responses((status = 200, description = "The room", body = Room), Refusals, RoomRefusals),
    security(("bearer" = []))
)]
pub async fn room(
    Caller(me): Caller,
    path: web::Path<String>,
    app: web::Data<App>,
) -> Result<web::Json<Room>, HttpError> {
    let room = app.context.messages.room(me, &path).await;
    Ok(web::Json(room.map_err(|e| counted(&app, e))?))
}

/// Which members.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub struct MembersQuery {
    /// `next` of the page before.
    #[param(minimum = 1)]
    after: Option<u64>,
    /// The largest number; 50 by default, at most 1,000.
    #[param(minimum = 1, example = 50)]
    limit: Option<u32>,
}

/// The members of a room, by user id.
#[utoipa::path(
    get, path = "/v1/rooms/{room}/members", operation_id = "room_members", tag = "rooms", params(("room" = String, Path, description = "The id of the room"), MembersQuery),
    responses((status = 200, description = "The page", body = RoomMembersPage), Refusals, RoomRefusals),
    security(("bearer" = []))
)]
pub async fn members(
    Caller(me): Caller,
    path: web::Path<String>,
    query: web::Query<MembersQuery>,
    app: web::Data<App>,
) -> Result<web::Json<RoomMembersPage>, HttpError> {
    let MembersQuery { after, limit } = query.into_inner();
    let messages = &app.context.messages;
    let page = messages.room_members(me, &path, after, None, limit).await;
    Ok(web::Json(page.map_err(|e| counted(&app, e))?))
}

/// Which readers.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub struct ReadersQuery {
    /// The seq of a message.
    #[param(minimum = 1, example = 118)]
    seq: u64,
    /// `next` of the page before.
    #[param(minimum = 1)]
    after: Option<u64>,
    /// The largest number; 50 by default, at most 1,000.
    #[param(minimum = 1, example = 50)]
    limit: Option<u32>,
}

/// The members of a room who have read up to a message, by user id.
#[utoipa::path(
    get, path = "/v1/rooms/{room}/readers", operation_id = "room_readers", tag = "rooms", params(("room" = String, Path, description = "The id of the room"), ReadersQuery),
    responses((status = 200, description = "The page", body = RoomMembersPage), Refusals, RoomRefusals),
    security(("bearer" = []))
)]
pub async fn readers(
    Caller(me): Caller,
    path: web::Path<String>,
    query: web::Query<ReadersQuery>,
    app: web::Data<App>,
) -> Result<web::Json<RoomMembersPage>, HttpError> {
    let ReadersQuery { seq, after, limit } = query.into_inner();
    let messages = &app.context.messages;
    let page = messages.room_members(me, &path, after, Some(seq), limit);
    Ok(web::Json(page.await.map_err(|e| counted(&app, e))?))
}

/// Change a room: add and remove members, give roles, set the title. With one's own user id in
/// `remove`, one leaves.
#[utoipa::path(
    post, path = "/v1/rooms/{room}/members", operation_id = "change_room", tag = "rooms", request_body = ChangeRoomRequest, params(("room" = String, Path, description = "The id of the room")),
    responses(
        (status = 201, description = "Changed; the place of the entry that says so", body = Sent),
        (status = 200, description = "A repeat of a request that was carried out before", body = Sent),
        (status = 204, description = "The room is like that already"),
        (status = 409, description = "The key was used in this room for another request (`key_reused`), or there are too many members (`room_full`)", body = ErrorBody),
        BodyRefusals, Refusals, RoomRefusals
    ),
    security(("bearer" = []))
)]
pub async fn change(
    Caller(me): Caller,
    path: web::Path<String>,
    body: web::Json<ChangeRoomRequest>,
    app: web::Data<App>,
) -> Result<HttpResponse, HttpError> {
    let messages = &app.context.messages;
    let done = settled(&app, |answer| {
        messages.change_room(me, &path, body.into_inner(), answer)
    });
    Ok(answer(done.await?))
}

/// Store a message in a room, and deliver it.
#[utoipa::path(
    post, path = "/v1/rooms/{room}/messages", operation_id = "send_to_room", tag = "rooms", request_body = SendRequest, params(("room" = String, Path, description = "The id of the room")),
    responses(
        (status = 201, description = "Stored", body = Sent),
        (status = 200, description = "A repeat of a send that was stored before", body = Sent),
        (status = 409, description = "The key was used in this room for another text", body = ErrorBody),
        BodyRefusals, Refusals, RoomRefusals
    ),
    security(("bearer" = []))
)]
pub async fn send(
    Caller(me): Caller,
    path: web::Path<String>,
    body: web::Json<SendRequest>,
    app: web::Data<App>,
) -> Result<HttpResponse, HttpError> {
    sent(
        &app,
        me,
        Target::Dialog(path.into_inner()),
        body.into_inner(),
    )
    .await
}

/// A page of a room, ascending; the newest unless `before` or `after` is given.
#[utoipa::path(
    get, path = "/v1/rooms/{room}/messages", operation_id = "room_history", tag = "rooms", params(("room" = String, Path, description = "The id of the room"), HistoryQuery),
    responses((status = 200, description = "The page", body = HistoryPage), Refusals, RoomRefusals),
    security(("bearer" = []))
)]
pub async fn history(
    Caller(me): Caller,
    path: web::Path<String>,
    query: web::Query<HistoryQuery>,
    app: web::Data<App>,
) -> Result<web::Json<HistoryPage>, HttpError> {
    page_of(&app, me, &Target::Dialog(path.into_inner()), &query).await
}

/// Mark a room as read up to a seq: forward only, never beyond the last message.
#[utoipa::path(
    put, path = "/v1/rooms/{room}/read", operation_id = "mark_room_read", tag = "rooms", request_body = ReadRequest, params(("room" = String, Path, description = "The id of the room")),
    responses((status = 200, description = "The mark as it is now", body = ReadMark), BodyRefusals, Refusals, RoomRefusals),
    security(("bearer" = []))
)]
pub async fn mark_read(
    Caller(me): Caller,
    path: web::Path<String>,
    body: web::Json<ReadRequest>,
    app: web::Data<App>,
) -> Result<web::Json<ReadMark>, HttpError> {
    let of = Target::Dialog(path.into_inner());
    let read = app.context.messages.mark_read(me, &of, body.seq).await;
    Ok(web::Json(read.map_err(|e| counted(&app, e))?.wire(me)))
}
