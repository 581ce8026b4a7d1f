//! The dialog that a request is about.

/// Another user, or a dialog by its id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum To {
    /// The dialog with this user.
    User(u64),
    /// The dialog with this id, such as `7_42`, or that of a room.
    Dialog(String),
}

impl From<u64> for To {
    fn from(user: u64) -> Self {
        To::User(user)
    }
}

impl From<String> for To {
    fn from(dialog: String) -> Self {
        To::Dialog(dialog)
    }
}

impl From<&str> for To {
    fn from(dialog: &str) -> Self {
        To::Dialog(dialog.to_owned())
    }
}

impl From<&To> for To {
    fn from(to: &To) -> Self {
        to.clone()
    }
}

impl To {
    /// The id of the dialog, for `user`.
    #[must_use]
    pub fn dialog(&self, user: u64) -> String {
        match self {
            To::User(with) => format!("{}_{}", user.min(*with), user.max(*with)),
            To::Dialog(dialog) => dialog.clone(),
        }
    }

    /// The values of `to` or `with`, and of `in`, in a frame.
    pub(crate) fn names(self) -> (Option<u64>, Option<String>) {
        match self {
            To::User(user) => (Some(user), None),
            To::Dialog(dialog) => (None, Some(dialog)),
        }
    }

    /// The path of the dialog in the REST API.
    pub(crate) fn path(&self) -> String {
        match self {
            To::User(user) => format!("/v1/dialogs/{user}"),
            To::Dialog(room) => format!("/v1/rooms/{room}"),
        }
    }
}
