//! A session that outlives its connections.

use crate::actor::{Actor, Command};
use crate::event::Event;
use crate::{Access, ClientError, To};
use chat_wire::{
    ChangeRoomRequest, ClientFrame, CreateRoomRequest, HistoryPage, InboxPage, Sent, ServerFrame,
};
use tokio::sync::{mpsc, oneshot};

/// The events of a client. While they are not taken, nothing else is read from the connection
/// either; dropped, they are no longer collected.
pub type Events = mpsc::Receiver<Event>;

/// A handle to a session; a clone is one more reference. The session ends when the last is dropped.
#[derive(Clone)]
pub struct Client {
    commands: mpsc::Sender<Command>,
}

/// Events and commands that may wait.
const QUEUE: usize = 1024;

impl Client {
    /// Starts a session of `user`, which connects by itself, and again whenever it has to.
    #[must_use]
    pub fn start(access: Access, user: u64) -> (Self, Events) {
        let (commands, commands_in) = mpsc::channel(QUEUE);
        let (events_out, events) = mpsc::channel(QUEUE);
        let actor = Actor::new(access, user, events_out);
        tokio::spawn(actor.run(commands_in));
        (Self { commands }, events)
    }

    /// Sends a text under a key that is unique to this author and dialog. Repeats it with the same
    /// key, across reconnections, for as long as the server says that it may succeed later.
    ///
    /// # Errors
    /// [`ClientError::Refused`] for good, [`ClientError::TooLarge`], or [`ClientError::Closed`].
    pub async fn send(
        &self,
        to: impl Into<To>,
        key: String,
        text: String,
    ) -> Result<Sent, ClientError> {
        self.enqueue(to, key, text).await?.await
    }

    /// As [`Client::send`], in two steps: when this returns, the message has its place in the order
    /// of the dialog; the future that it returns ends when the message is stored. The sends of a
    /// dialog are stored in the order of these calls, whatever the connection and the server do.
    ///
    /// # Errors
    /// [`ClientError::Closed`]; the future has the errors of [`Client::send`].
    pub async fn enqueue(
        &self,
        to: impl Into<To>,
        key: String,
        text: String,
    ) -> Result<impl Future<Output = Result<Sent, ClientError>> + Send + 'static, ClientError> {
        let (answer, answered) = oneshot::channel();
        self.command(Command::Send {
            key,
            to: to.into(),
            text,
            answer,
        })
        .await?;
        Ok(async move { answered.await.map_err(|_| ClientError::Closed)? })
    }

    /// A page of a dialog.
    ///
    /// # Errors
    /// As [`Client::send`].
    pub async fn history(
        &self,
        of: impl Into<To>,
        before: Option<u64>,
        after: Option<u64>,
        limit: Option<u32>,
    ) -> Result<HistoryPage, ClientError> {
        let (with, dialog) = of.into().names();
        let answer = self
            .ask(move |id| ClientFrame::History {
                id: Some(id),
                with,
                dialog,
                before,
                after,
                limit,
            })
            .await?;
        let ServerFrame::History { page, .. } = answer else {
            return Err(another());
        };
        Ok(page)
    }

    /// Makes a room, with this user as its owner; returns its id. The same key names the same room,
    /// however often it is asked for.
    ///
    /// # Errors
    /// As [`Client::send`].
    pub async fn create_room(&self, room: CreateRoomRequest) -> Result<String, ClientError> {
        let answer = self
            .ask(move |id| ClientFrame::Create { id: Some(id), room })
            .await?;
        let ServerFrame::Created { dialog, .. } = answer else {
            return Err(another());
        };
        Ok(dialog)
    }

    /// Changes a room: its members, their roles, its title. The change comes as an event.
    ///
    /// # Errors
    /// As [`Client::send`].
    pub async fn change_room(
        &self,
        room: String,
        change: ChangeRoomRequest,
    ) -> Result<(), ClientError> {
        let members = move |id| ClientFrame::Members {
            id: Some(id),
            dialog: room,
            change,
        };
        self.ask(members).await.map(drop)
    }

    /// A page of the inbox.
    ///
    /// # Errors
    /// As [`Client::send`].
    pub async fn inbox(
        &self,
        limit: Option<u32>,
        cursor: Option<String>,
    ) -> Result<InboxPage, ClientError> {
        let answer = self
            .ask(move |id| ClientFrame::Inbox {
                id: Some(id),
                limit,
                cursor,
            })
            .await?;
        let ServerFrame::Inbox { page, .. } = answer else {
            return Err(another());
        };
        Ok(page)
    }

    /// Marks a dialog as read up to `seq`, if there is a connection.
    ///
    /// # Errors
    /// [`ClientError::Closed`].
    pub async fn mark_read(&self, of: impl Into<To>, seq: u64) -> Result<(), ClientError> {
        // The server answers a mark with the mark, which comes as an event. This call does not wait
        // for it.
        self.command(Command::Mark { of: of.into(), seq }).await
    }

    /// Reports in a dialog that the user is typing, if there is a connection.
    ///
    /// # Errors
    /// [`ClientError::Closed`].
    pub async fn typing(&self, to: impl Into<To>) -> Result<(), ClientError> {
        self.command(Command::Typing { to: to.into() }).await
    }

    /// From now on [`Event::Presence`] reports whether these users are online.
    ///
    /// # Errors
    /// [`ClientError::Closed`].
    pub async fn watch(&self, users: Vec<u64>) -> Result<(), ClientError> {
        self.command(Command::Watch { users, watch: true }).await
    }

    /// No longer.
    ///
    /// # Errors
    /// [`ClientError::Closed`].
    pub async fn unwatch(&self, users: Vec<u64>) -> Result<(), ClientError> {
        self.command(Command::Watch {
            users,
            watch: false,
        })
        .await
    }

    /// From now on [`Event::Message`] has every message of a dialog above `after`, and
    /// [`Event::Read`] the marks of its users.
    ///
    /// # Errors
    /// [`ClientError::Closed`].
    pub async fn follow(&self, dialog: String, after: u64) -> Result<(), ClientError> {
        self.command(Command::Follow { dialog, after }).await
    }

    async fn ask(
        &self,
        frame: impl FnOnce(String) -> ClientFrame + Send + 'static,
    ) -> Result<ServerFrame, ClientError> {
        let (answer, answered) = oneshot::channel();
        self.command(Command::Ask {
            frame: Box::new(frame),
            answer,
        })
        .await?;
        answered.await.map_err(|_| ClientError::Closed)?
    }

    async fn command(&self, command: Command) -> Result<(), ClientError> {
        self.commands
            .send(command)
            .await
            .map_err(|_| ClientError::Closed)
    }
}

/// An answer with the id of a request, but of another kind.
fn another() -> ClientError {
    ClientError::Connection("the server answered something else".into())
}
