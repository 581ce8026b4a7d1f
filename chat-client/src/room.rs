//! `chat-client room`: makes rooms, changes them, and says who is in them.

use crate::output;
use chat_client::{Access, Api};
use chat_wire::{ChangeRoomRequest, CreateRoomRequest, Role, RoomHistory};
use clap::builder::RangedU64ValueParser;
use clap::{Args, Subcommand, ValueEnum};
use std::collections::BTreeMap;

/// What to do with rooms.
#[derive(Subcommand)]
pub enum Command {
    /// Make a room, and print its id.
    Create {
        /// The user who makes it, and owns it.
        #[arg(long, value_parser = user_id())]
        user: u64,
        /// Its title.
        #[arg(long)]
        title: Option<String>,
        /// What those who join may read: all of it, or what is written since.
        #[arg(long, value_enum, default_value_t = History::All)]
        history: History,
        /// The name of this request; a random one if left out. The same user and key name the same
        /// room.
        #[arg(long)]
        key: Option<String>,
        /// The user ids of the other members.
        #[arg(value_parser = user_id())]
        members: Vec<u64>,
    },
    /// Add members.
    Add(Members),
    /// Remove members; a user who removes itself leaves.
    Remove(Members),
    /// Leave a room.
    Leave(Room),
    /// Give members a role; a new owner takes the place of the old one.
    Role {
        /// The room, and who asks.
        #[command(flatten)]
        room: Room,
        /// The role.
        #[arg(value_enum)]
        role: RoleName,
        /// The user ids.
        #[arg(required = true, value_parser = user_id())]
        members: Vec<u64>,
    },
    /// Set the title.
    Title {
        /// The room, and who asks.
        #[command(flatten)]
        room: Room,
        /// The new title.
        title: String,
    },
    /// Print a room, and its members, a JSON object each.
    Show(Room),
    /// Print the members who have read up to a message, a JSON object each.
    Readers {
        /// The room, and who asks.
        #[command(flatten)]
        room: Room,
        /// The seq of the message.
        seq: u64,
    },
    /// Print the rooms of a user, a JSON object each.
    List {
        /// The user id.
        #[arg(long, value_parser = user_id())]
        user: u64,
    },
}

/// A room, and who asks.
#[derive(Args)]
pub struct Room {
    /// The user id.
    #[arg(long, value_parser = user_id())]
    user: u64,
    /// The id of the room.
    #[arg(long)]
    room: String,
}

/// Members of a room.
#[derive(Args)]
pub struct Members {
    /// The room, and who asks.
    #[command(flatten)]
    room: Room,
    /// The user ids.
    #[arg(required = true, value_parser = user_id())]
    members: Vec<u64>,
}

/// What those who join may read.
#[derive(Clone, Copy, ValueEnum)]
pub enum History {
    /// Everything.
    All,
    /// What is written from then on.
    Since,
}

/// What a member may do.
#[derive(Clone, Copy, ValueEnum)]
pub enum RoleName {
    /// Read and write.
    Member,
    /// Also add and remove members, and set the title.
    Admin,
    /// Also give roles.
    Owner,
}

fn user_id() -> RangedU64ValueParser {
    crate::user_id()
}

/// Runs a command.
///
/// # Errors
/// If the service refuses it.
pub async fn run(access: Access, command: Command) -> anyhow::Result<()> {
    let change = ChangeRoomRequest {
        key: crate::new_key(),
        ..ChangeRoomRequest::default()
    };
    let (room, change) = match command {
        Command::Create {
            user,
            title,
            history,
            key,
            members,
        } => {
            let request = CreateRoomRequest {
                key: key.unwrap_or_else(crate::new_key),
                title,
                members,
                history: match history {
                    History::All => RoomHistory::All,
                    History::Since => RoomHistory::Since,
                },
            };
            let made = Api::new(access, user).await?.create_room(&request).await?;
            return output::line(&made.dialog);
        }
        Command::Show(Room { user, room }) => {
            let api = Api::new(access, user).await?;
            output::json(&api.room(&room).await?)?;
            let members = api.room_members(&room).await?;
            return members.iter().try_for_each(output::json);
        }
        Command::Readers { room, seq } => {
            let api = Api::new(access, room.user).await?;
            let readers = api.room_readers(&room.room, seq).await?;
            return readers.iter().try_for_each(output::json);
        }
        Command::List { user } => {
            let api = Api::new(access, user).await?;
            return crate::inbox(&api, |entry| entry.dialog.starts_with('r')).await;
        }
        Command::Add(Members { room, members }) => {
            let add = members;
            (room, ChangeRoomRequest { add, ..change })
        }
        Command::Remove(Members { room, members }) => {
            let remove = members;
            (room, ChangeRoomRequest { remove, ..change })
        }
        Command::Leave(room) => {
            let remove = vec![room.user];
            (room, ChangeRoomRequest { remove, ..change })
        }
        Command::Role {
            room,
            role,
            members,
        } => {
            let role = match role {
                RoleName::Member => Role::Member,
                RoleName::Admin => Role::Admin,
                RoleName::Owner => Role::Owner,
            };
            let roles = members.iter().map(|user| (user.to_string(), role));
            let roles: BTreeMap<String, Role> = roles.collect();
            (room, ChangeRoomRequest { roles, ..change })
        }
        Command::Title { room, title } => {
            let title = Some(title);
            (room, ChangeRoomRequest { title, ..change })
        }
    };
    let api = Api::new(access, room.user).await?;
    match api.change_room(&room.room, &change).await? {
        Some(entry) => output::json(&entry),
        None => {
            output::note("the room is like that already");
            Ok(())
        }
    }
}
