//! Two users, one terminal each.

mod terminal;

use anyhow::{Context, bail};
use chat_client::{Access, Client, Event, To};
use chat_wire::{HistoryPage, Kind, Message};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use jiff::{Timestamp, ZonedDateTime};
use std::collections::BTreeMap;
use std::time::Duration;
use terminal::{Input, Screen};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

/// Messages shown on entry.
const ENTRY: u32 = 20;

/// Lines that were typed and not taken yet.
const TYPED: usize = 64;

/// A user from whom no further `typing` arrives has stopped.
const TYPING: Duration = Duration::from_secs(6);

/// What `/help` shows.
const HELP: &str = "\
/help   this list
/quit   ends; so does Ctrl-D
//text  sends a text that begins with /
Alt-Enter begins a new line of the same message; a pasted text keeps its lines.";

/// Messages that are under way at once. More input waits.
const UNDER_WAY: usize = 64;

/// When the user is told that messages wait.
const SLOW: Duration = Duration::from_secs(2);

/// Talks as `user` in a dialog, until the end of the input.
///
/// # Errors
/// If the session is refused, or if something was not sent.
pub async fn run(access: Access, user: u64, with: To) -> anyhow::Result<()> {
    let (typed_out, mut typed) = mpsc::channel(TYPED);
    let screen = terminal::open(typed_out)?;
    let (client, mut events) = Client::start(access, user);
    let alone = with == To::User(user);
    if let (To::User(with), false) = (&with, alone) {
        client.watch(vec![*with]).await?;
    }
    let newest = client.history(&with, None, None, Some(ENTRY));
    tokio::pin!(newest);
    let mut view = View {
        screen,
        client: client.clone(),
        user,
        with: with.clone(),
        dialog: with.dialog(user),
        last: None,
        typing: BTreeMap::new(),
        mine: 0,
        seen: 0,
    };
    // Messages without an answer.
    let mut under_way = FuturesUnordered::new();
    let (mut open, mut shown_until) = (true, Instant::now());
    let (mut not_sent, mut slow_at) = (0_u64, None);
    // The end comes when all that was sent is on the screen.
    let mut sent_up_to = 0;
    while open || !under_way.is_empty() || view.last < Some(sent_up_to) {
        let typing_ends = view.typing_ends();
        tokio::select! {
            page = &mut newest, if view.last.is_none() => view.enter(page?).await?,
            event = events.recv() => view.event(event.context("the session ended")?).await?,
            () = sleep_until(typing_ends.unwrap_or_else(Instant::now)), if typing_ends.is_some() => {
                view.typing.retain(|_, until| *until > Instant::now());
            }
            () = sleep_until(slow_at.unwrap_or_else(Instant::now)), if slow_at.is_some() => {
                slow_at = None;
                view.screen.say(&format!("— {} not sent yet; waiting —", under_way.len()))?;
            }
            input = typed.recv(), if open && under_way.len() < UNDER_WAY => match input {
                Some(Input::Key) => if shown_until <= Instant::now() && !alone {
                    shown_until = Instant::now() + TYPING / 2;
                    client.typing(&with).await?;
                },
                Some(Input::Text(text)) => {
                    shown_until = Instant::now();
                    if under_way.is_empty() {
                        slow_at = Some(Instant::now() + SLOW);
                    }
                    under_way.push(client.enqueue(&with, crate::new_key(), text).await?);
                }
                Some(Input::Command(command)) => match command.as_str() {
                    "quit" => open = false,
                    "help" => view.screen.say(HELP)?,
                    other => view.screen.say(&format!("— no command /{other}; see /help —"))?,
                },
                Some(Input::Unusable(what)) => {
                    not_sent += 1;
                    view.screen.say(&format!("— not sent: {what} —"))?;
                }
                None => open = false,
            },
            Some(sent) = under_way.next() => {
                if under_way.is_empty() {
                    slow_at = None;
                }
                // A sent message is shown at its place in the order; the client reports it before
                // it answers.
                while let Ok(event) = events.try_recv() {
                    view.event(event).await?;
                }
                match sent {
                    Ok(sent) => sent_up_to = sent_up_to.max(sent.seq),
                    Err(e) => {
                        not_sent += 1;
                        view.screen.say(&format!("— not sent: {e} —"))?;
                    }
                }
            }
        }
    }
    match not_sent {
        0 => Ok(()),
        n => bail!("{n} not sent"),
    }
}

/// What is on the screen: everything up to `last`, in order and without a gap.
struct View {
    screen: Screen,
    client: Client,
    user: u64,
    with: To,
    /// The id of the dialog.
    dialog: String,
    last: Option<u64>,
    /// Until when others are shown as typing.
    typing: BTreeMap<u64, Instant>,
    /// Our last message.
    mine: u64,
    /// Our last message that was reported as read.
    seen: u64,
}

impl View {
    /// When the next of those who are typing has stopped.
    fn typing_ends(&self) -> Option<Instant> {
        self.typing.values().min().copied()
    }

    /// Shows the newest few, and follows the dialog from there.
    async fn enter(&mut self, page: HistoryPage) -> anyhow::Result<()> {
        if page.gap {
            self.screen.say(
                "— some earlier messages are missing for now; they come back in their place —",
            )?;
        }
        self.last = Some(page.last);
        for message in &page.messages {
            self.show(message)?;
        }
        self.client.follow(self.dialog.clone(), page.last).await?;
        self.read().await
    }

    async fn event(&mut self, event: Event) -> anyhow::Result<()> {
        match event {
            Event::Connected => self.screen.say("— connected —")?,
            Event::Disconnected { reason, .. } => {
                self.typing.clear();
                self.screen
                    .say(&format!("— disconnected ({reason}); trying again —"))?;
            }
            Event::Message(message) | Event::Entry(message) if message.dialog == self.dialog => {
                // What comes before the first page is in it, or comes again after it.
                if self.last.is_some_and(|last| last < message.seq) {
                    self.last = Some(message.seq);
                    self.show(&message)?;
                    self.read().await?;
                }
            }
            Event::Message(message) if message.from != self.user => {
                let from = message.from;
                self.screen
                    .say(&format!("— {from} writes to you in another dialog —"))?;
            }
            Event::Read(mark) if mark.dialog == self.dialog && mark.user != self.user => {
                if self.mine > self.seen && mark.seq >= self.mine {
                    self.seen = self.mine;
                    self.screen.say(&format!("— {} has read it —", mark.user))?;
                }
            }
            Event::Typing { dialog, user } if dialog == self.dialog => {
                let until = Instant::now() + TYPING;
                if self.typing.insert(user, until).is_none() {
                    self.screen.say(&format!("— {user} is typing —"))?;
                }
            }
            Event::Presence(presence) => {
                let how = if presence.online { "here" } else { "away" };
                self.screen
                    .say(&format!("— {} is {how} —", presence.user))?;
            }
            Event::Resync(dialog) if dialog == self.dialog => {
                self.screen
                    .say("— the log is not what it was; leave and come back to read it anew —")?;
            }
            Event::Resync(dialog) => {
                self.screen
                    .say(&format!("— new messages in the dialog {dialog} —"))?;
            }
            Event::Closed(e) => return Err(e.into()),
            Event::Message(_) | Event::Entry(_) | Event::Read(_) | Event::Typing { .. } => {}
        }
        Ok(())
    }

    fn show(&mut self, message: &Message) -> anyhow::Result<()> {
        if message.from == self.user {
            self.mine = message.seq;
        } else {
            self.typing.remove(&message.from);
        }
        let now = ZonedDateTime::now();
        match message.kind {
            Kind::Text => self.screen.say(&line(message, &now)),
            Kind::Member => self.screen.say(&format!("— {} —", change(message))),
            Kind::Other(_) => Ok(()),
        }
    }

    async fn read(&self) -> anyhow::Result<()> {
        if let Some(last) = self.last.filter(|last| *last > 0) {
            self.client.mark_read(&self.with, last).await?;
        }
        Ok(())
    }
}

/// What an entry changes of a room.
fn change(entry: &Message) -> String {
    let from = entry.from;
    let list = |users: &[u64]| {
        let users: Vec<String> = users.iter().map(ToString::to_string).collect();
        users.join(", ")
    };
    let mut parts = Vec::new();
    let joined: Vec<u64> = entry
        .joined
        .iter()
        .copied()
        .filter(|user| *user != from)
        .collect();
    if entry.seq == 1 {
        parts.push(format!("{from} makes the room"));
    }
    if !joined.is_empty() {
        parts.push(format!("{from} adds {}", list(&joined)));
    }
    if entry.left.contains(&from) {
        parts.push(format!("{from} leaves"));
    }
    let removed: Vec<u64> = entry
        .left
        .iter()
        .copied()
        .filter(|user| *user != from)
        .collect();
    if !removed.is_empty() {
        parts.push(format!("{from} removes {}", list(&removed)));
    }
    let roles = entry.roles.iter();
    parts.extend(roles.map(|(user, role)| format!("{user} is {} now", role.as_str())));
    if let Some(title) = &entry.title {
        parts.push(format!("the title is {title:?}"));
    }
    parts.join("; ")
}

/// `12:34 7: hello`, by the clock of this machine, with the date if it is another day. Lines after
/// the first are indented.
fn line(message: &Message, now: &ZonedDateTime) -> String {
    let at: Option<Timestamp> = message.at.parse().ok();
    let time = at.map_or_else(String::new, |at| {
        let at = at.to_zoned_datetime(now.time_zone().clone());
        let today = at.date() == now.date();
        let form = if today { "%H:%M " } else { "%Y-%m-%d %H:%M " };
        at.strftime(form).to_string()
    });
    let from = format!("{time}{}: ", message.from);
    let indent = format!("\n{}", " ".repeat(from.len()));
    from + &message.text.replace('\t', "    ").replace('\n', &indent)
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::tz::TimeZone;

    #[test]
    fn a_change_of_a_room_is_told_in_words() {
        let entry = Message {
            seq: 5,
            from: 7,
            joined: vec![9, 10],
            left: vec![7, 8],
            roles: BTreeMap::from([("9".to_owned(), chat_wire::Role::Owner)]),
            title: Some("lunch".into()),
            ..Message::default()
        };
        assert_eq!(
            change(&entry),
            "7 adds 9, 10; 7 leaves; 7 removes 8; 9 is owner now; the title is \"lunch\""
        );
    }

    #[test]
    fn a_message_is_shown_with_its_lines_by_the_clock_of_this_machine() {
        let message = Message {
            dialog: "7_42".into(),
            seq: 1,
            from: 7,
            to: Some(42),
            text: "one\n\ttwo \u{1b}[2J".into(),
            at: "2026-01-31T23:34:56.000001Z".into(),
            ..Message::default()
        };
        let zone = TimeZone::fixed(jiff::tz::offset(2));
        let at = |time: &str| {
            time.parse::<Timestamp>()
                .unwrap()
                .to_zoned_datetime(zone.clone())
        };
        assert_eq!(
            line(&message, &at("2026-02-01T00:00:00Z")),
            "01:34 7: one\n             two \u{1b}[2J"
        );
        assert_eq!(
            line(&message, &at("2026-02-02T00:00:00Z")),
            "2026-02-01 01:34 7: one\n                        two \u{1b}[2J"
        );
    }
}
