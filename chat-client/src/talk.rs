//! Two people, one terminal each.

use anyhow::Context;
use chat_client::{Access, Client, ClientError, Event};
use chat_wire::Message;
use rustyline::error::ReadlineError;
use rustyline::{DefaultEditor, ExternalPrinter};
use std::io::{BufRead, IsTerminal, Write};
use tokio::sync::mpsc;

/// Messages shown on entry.
const ENTRY: u32 = 20;

/// Lines that were typed and not taken yet.
const TYPED: usize = 64;

/// Talks as `user` with `with`, until the end of the input.
pub async fn run(access: Access, user: u64, with: u64) -> anyhow::Result<()> {
    let (typed_out, mut typed) = mpsc::channel(TYPED);
    let mut screen = read_lines(typed_out)?;
    let (client, mut events) = Client::start(access, user);
    let mut view = View {
        user,
        with,
        last: None,
    };
    let (failed_out, mut failed) = mpsc::channel::<ClientError>(TYPED);
    let (done_out, mut done) = mpsc::channel::<Message>(TYPED);
    let mut open = true;
    let mut under_way = 0usize;
    loop {
        if !open && under_way == 0 {
            return Ok(());
        }
        tokio::select! {
            event = events.recv() => match event.context("the session ended")? {
                Event::Connected => {
                    screen.say("— connected —")?;
                    view.catch_up(&client, &mut screen, &mut events).await?;
                }
                Event::Disconnected { reason, .. } => screen.say(&format!("— disconnected ({reason}); trying again —"))?,
                Event::Message(message) => view.take(message, &client, &mut screen, &mut events).await?,
                Event::Read(_) => {}
                Event::Closed(e) => return Err(e.into()),
            },
            line = typed.recv(), if open => match line {
                Some(line) if line.trim().is_empty() => {}
                Some(line) => {
                    // Sends take the order of their lines: the queue to the client keeps it.
                    let (client, failed, done) = (client.clone(), failed_out.clone(), done_out.clone());
                    under_way += 1;
                    let key = crate::new_key();
                    let sending = async move {
                        match client.send(with, key.clone(), line.clone()).await {
                            Ok(sent) => {
                                let message = Message { dialog: sent.dialog, seq: sent.seq, from: user, to: with, text: line, at: sent.at, key: Some(key) };
                                let _ = done.send(message).await;
                            }
                            Err(e) => drop(failed.send(e).await),
                        }
                    };
                    tokio::spawn(sending);
                    tokio::task::yield_now().await;
                }
                None => open = false,
            },
            Some(message) = done.recv() => {
                under_way -= 1;
                view.take(message, &client, &mut screen, &mut events).await?;
            }
            Some(e) = failed.recv() => {
                under_way -= 1;
                screen.say(&format!("— not sent: {e} —"))?;
            }
        }
    }
}

/// What is on the screen: everything up to `last`, in order and without a gap.
struct View {
    user: u64,
    with: u64,
    last: Option<u64>,
}

impl View {
    /// Shows a message of this dialog in its place; reads what is missing before it.
    async fn take(
        &mut self,
        message: Message,
        client: &Client,
        screen: &mut Screen,
        events: &mut chat_client::Events,
    ) -> anyhow::Result<()> {
        let ours = [message.from, message.to];
        if !(ours.contains(&self.user) && ours.contains(&self.with)) {
            return screen.say(&format!(
                "— {} writes to you in another dialog —",
                message.from
            ));
        }
        match self.last {
            Some(last) if message.seq <= last => Ok(()),
            Some(last) if message.seq == last + 1 => {
                self.last = Some(message.seq);
                screen.say(&line(&message))
            }
            _ => self.catch_up(client, screen, events).await,
        }
    }

    /// Shows what came since the last message on the screen; on entry, the newest few.
    async fn catch_up(
        &mut self,
        client: &Client,
        screen: &mut Screen,
        events: &mut chat_client::Events,
    ) -> anyhow::Result<()> {
        loop {
            let limit = if self.last.is_some() { 200 } else { ENTRY };
            let asked = client.history(self.with, None, self.last, Some(limit));
            tokio::pin!(asked);
            // Events must be taken while we wait: what they tell, the page tells too.
            let page = loop {
                tokio::select! {
                    page = &mut asked => break page?,
                    event = events.recv() => match event.context("the session ended")? {
                        Event::Closed(e) => return Err(e.into()),
                        Event::Disconnected { reason, .. } => screen.say(&format!("— disconnected ({reason}); trying again —"))?,
                        Event::Connected => screen.say("— connected —")?,
                        Event::Message(_) | Event::Read(_) => {}
                    },
                }
            };
            let on_entry = self.last.is_none();
            if on_entry && page.gap {
                screen.say(
                    "— some earlier messages are missing for now; they come back in their place —",
                )?;
            }
            for message in &page.messages {
                screen.say(&line(message))?;
            }
            self.last = Some(
                page.messages
                    .last()
                    .map_or(self.last.unwrap_or(0), |message| message.seq),
            );
            if let (Some(last), false) = (self.last, page.messages.is_empty()) {
                client.mark_read(self.with, last).await?;
            }
            if on_entry || !page.more {
                // A message may have come between the page and its arrival: the next one shows it as a gap.
                return Ok(());
            }
        }
    }
}

/// `12:34 7: hello`, with control characters shown as what they are: a text must not move the cursor of its reader.
fn line(message: &Message) -> String {
    let text: String = message
        .text
        .chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect();
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

/// Reads lines on a thread of its own, from a terminal with editing, or from a pipe.
fn read_lines(out: mpsc::Sender<String>) -> anyhow::Result<Screen> {
    if !std::io::stdin().is_terminal() {
        std::thread::spawn(move || {
            for line in std::io::stdin().lock().lines().map_while(Result::ok) {
                if out.blocking_send(line).is_err() {
                    return;
                }
            }
        });
        return Ok(Screen::Plain);
    }
    let mut editor = DefaultEditor::new()?;
    let printer = editor.create_external_printer()?;
    std::thread::spawn(move || {
        loop {
            match editor.readline("> ") {
                Ok(line) => {
                    let _ = editor.add_history_entry(&line);
                    if out.blocking_send(line).is_err() {
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
