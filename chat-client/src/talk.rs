//! Two users, one terminal each.

use crate::output;
use anyhow::Context;
use chat_client::{Access, Client, ClientError, Event};
use chat_wire::{HistoryPage, Message};
use rustyline::completion::Completer;
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::DefaultHistory;
use rustyline::validate::Validator;
use rustyline::{Editor, ExternalPrinter, Helper};
use std::io::{BufRead, IsTerminal, Write};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

/// Messages shown on entry.
const ENTRY: u32 = 20;

/// Lines that were typed and not taken yet.
const TYPED: usize = 64;

/// A user from whom no further `typing` arrives has stopped.
const TYPING: Duration = Duration::from_secs(6);

/// Talks as `user` with `with`, until the end of the input.
pub async fn run(access: Access, user: u64, with: u64) -> anyhow::Result<()> {
    let (typed_out, mut typed) = mpsc::channel(TYPED);
    let screen = read_input(typed_out)?;
    let (client, mut events) = Client::start(access, user);
    if with != user {
        client.watch(vec![with]).await?;
    }
    let (done_out, mut done) = mpsc::channel::<Result<(), ClientError>>(TYPED);
    let newest = client.history(with, None, None, Some(ENTRY));
    tokio::pin!(newest);
    let mut view = View {
        screen,
        client: client.clone(),
        user,
        with,
        last: None,
        theirs_typing: None,
        mine: 0,
        seen: 0,
    };
    let (mut open, mut under_way, mut shown_until) = (true, 0usize, Instant::now());
    loop {
        if !open && under_way == 0 {
            return Ok(());
        }
        let typing_ends = view.theirs_typing.unwrap_or_else(Instant::now);
        tokio::select! {
            page = &mut newest, if view.last.is_none() => view.enter(page?).await?,
            event = events.recv() => view.event(event.context("the session ended")?).await?,
            () = sleep_until(typing_ends), if view.theirs_typing.is_some() => view.theirs_typing = None,
            input = typed.recv(), if open => match input {
                Some(Input::Key) => if shown_until <= Instant::now() && with != user {
                    shown_until = Instant::now() + TYPING / 2;
                    client.typing(with).await?;
                },
                Some(Input::Line(line)) if line.trim().is_empty() => {}
                Some(Input::Line(line)) => {
                    // Sends take the order of their lines: the queue to the client keeps it.
                    let (client, done) = (client.clone(), done_out.clone());
                    under_way += 1;
                    shown_until = Instant::now();
                    tokio::spawn(async move {
                        let sent = client.send(with, crate::new_key(), line).await;
                        let _ = done.send(sent.map(drop)).await;
                    });
                    tokio::task::yield_now().await;
                }
                None => open = false,
            },
            Some(sent) = done.recv() => {
                under_way -= 1;
                // A sent message is shown at its place in the order; the client reports it before
                // it answers.
                while let Ok(event) = events.try_recv() {
                    view.event(event).await?;
                }
                if let Err(e) = sent {
                    view.screen.say(&format!("— not sent: {e} —"))?;
                }
            }
        }
    }
}

/// What is on the screen: everything up to `last`, in order and without a gap.
struct View {
    screen: Screen,
    client: Client,
    user: u64,
    with: u64,
    last: Option<u64>,
    /// Until when the other is shown as typing.
    theirs_typing: Option<Instant>,
    /// Our last message.
    mine: u64,
    /// Our last message that was reported as read.
    seen: u64,
}

impl View {
    fn dialog(&self) -> String {
        format!("{}_{}", self.user.min(self.with), self.user.max(self.with))
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
        self.client.follow(self.dialog(), page.last).await?;
        self.read().await
    }

    async fn event(&mut self, event: Event) -> anyhow::Result<()> {
        match event {
            Event::Connected => self.screen.say("— connected —")?,
            Event::Disconnected { reason, .. } => {
                self.theirs_typing = None;
                self.screen
                    .say(&format!("— disconnected ({reason}); trying again —"))?;
            }
            Event::Message(message) if message.dialog == self.dialog() => {
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
            Event::Read(mark) if mark.dialog == self.dialog() && mark.user == self.with => {
                if self.with != self.user && self.mine > self.seen && mark.seq >= self.mine {
                    self.seen = self.mine;
                    self.screen.say(&format!("— {} has read it —", self.with))?;
                }
            }
            Event::Typing { dialog, user } if dialog == self.dialog() => {
                if self.theirs_typing.is_none() {
                    self.screen.say(&format!("— {user} is typing —"))?;
                }
                self.theirs_typing = Some(Instant::now() + TYPING);
            }
            Event::Presence(presence) => {
                let how = if presence.online { "here" } else { "away" };
                self.screen
                    .say(&format!("— {} is {how} —", presence.user))?;
            }
            Event::Resync(dialog) if dialog == self.dialog() => {
                self.screen
                    .say("— the log is not what it was; leave and come back to read it anew —")?;
            }
            Event::Resync(dialog) => {
                self.screen
                    .say(&format!("— new messages in the dialog {dialog} —"))?;
            }
            Event::Closed(e) => return Err(e.into()),
            Event::Message(_) | Event::Read(_) | Event::Typing { .. } => {}
        }
        Ok(())
    }

    fn show(&mut self, message: &Message) -> anyhow::Result<()> {
        if message.from == self.user {
            self.mine = message.seq;
        } else {
            self.theirs_typing = None;
        }
        self.screen.say(&line(message))
    }

    async fn read(&self) -> anyhow::Result<()> {
        if let Some(last) = self.last.filter(|last| *last > 0) {
            self.client.mark_read(self.with, last).await?;
        }
        Ok(())
    }
}

/// `12:34 7: hello`, with control characters shown as what they are: a text must not move the
/// cursor of its reader.
fn line(message: &Message) -> String {
    let text = output::plain(&message.text);
    let time = message.at.get(11..16).unwrap_or_default();
    format!("{time} {}: {text}", message.from)
}

enum Screen {
    Terminal(Box<dyn ExternalPrinter + Send>),
    Plain,
}

impl Screen {
    fn say(&mut self, line: &str) -> anyhow::Result<()> {
        match self {
            Screen::Terminal(printer) => Ok(printer.print(format!("{line}\n"))?),
            Screen::Plain => Ok(writeln!(std::io::stdout(), "{line}")?),
        }
    }
}

/// What comes from the keyboard.
enum Input {
    /// Something was typed into a line.
    Key,
    /// A line is done.
    Line(String),
}

/// Reads lines on a thread of its own, from a terminal with editing, or from a pipe.
fn read_input(out: mpsc::Sender<Input>) -> anyhow::Result<Screen> {
    if !std::io::stdin().is_terminal() {
        std::thread::spawn(move || {
            for line in std::io::stdin().lock().lines().map_while(Result::ok) {
                if out.blocking_send(Input::Line(line)).is_err() {
                    return;
                }
            }
        });
        return Ok(Screen::Plain);
    }
    let mut editor = Editor::<Keys, DefaultHistory>::new()?;
    editor.set_helper(Some(Keys(out.clone())));
    let printer = editor.create_external_printer()?;
    std::thread::spawn(move || {
        loop {
            match editor.readline("> ") {
                Ok(line) => {
                    let _ = editor.add_history_entry(&line);
                    if out.blocking_send(Input::Line(line)).is_err() {
                        return;
                    }
                }
                Err(ReadlineError::Interrupted | ReadlineError::Eof) => return,
                Err(e) => {
                    eprintln!("{e}");
                    return;
                }
            }
        }
    });
    Ok(Screen::Terminal(Box::new(printer)))
}

/// Notices typing: the editor asks it for a hint at every key.
struct Keys(mpsc::Sender<Input>);

impl Hinter for Keys {
    type Hint = String;

    fn hint(&self, line: &str, _: usize, _: &rustyline::Context<'_>) -> Option<String> {
        if !line.is_empty() {
            // Of the moment only: there are more keys.
            let _ = self.0.try_send(Input::Key);
        }
        None
    }
}

impl Completer for Keys {
    type Candidate = String;
}

impl Highlighter for Keys {}
impl Validator for Keys {}
impl Helper for Keys {}
