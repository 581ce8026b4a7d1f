//! The keyboard and the screen of a talk: a terminal with a line editor, or pipes.

use crate::output;
use anyhow::Context;
use rustyline::completion::Completer;
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::DefaultHistory;
use rustyline::validate::Validator;
use rustyline::{Cmd, Editor, ExternalPrinter, Helper, KeyCode, KeyEvent, Modifiers};
use std::io::{BufRead, ErrorKind, IsTerminal, Write};
use tokio::sync::mpsc;
use unicode_width::UnicodeWidthStr;

/// What comes from the keyboard.
pub enum Input {
    /// Something was typed into a line.
    Key,
    /// A text is done.
    Text(String),
    /// A command: a line that begins with `/`, without it. Only a terminal has commands.
    Command(String),
    /// Something that cannot be sent: what it is.
    Unusable(String),
}

/// Where lines are shown.
pub enum Screen {
    /// Above the line that is being typed.
    Terminal(Box<dyn ExternalPrinter + Send>),
    /// On standard output.
    Plain,
}

impl Screen {
    /// Shows a text. Control characters in it, other than the ends of lines, are shown as a
    /// replacement character: it must not move the cursor of its reader.
    pub fn say(&mut self, text: &str) -> anyhow::Result<()> {
        let lines: Vec<String> = text.split('\n').map(output::plain).collect();
        let text = lines.join("\n");
        match self {
            Screen::Terminal(printer) => Ok(printer.print(text + "\n")?),
            Screen::Plain => output::line(&text),
        }
    }
}

const PROMPT: &str = "> ";

/// Reads on a thread of its own, from a terminal with editing, or from a pipe: a text a line.
pub fn open(out: mpsc::Sender<Input>) -> anyhow::Result<Screen> {
    if !std::io::stdin().is_terminal() {
        std::thread::spawn(move || read_pipe(&out));
        return Ok(Screen::Plain);
    }
    let mut editor = Editor::<Keys, DefaultHistory>::new().context("the terminal")?;
    editor.set_helper(Some(Keys(out.clone())));
    editor.bind_sequence(KeyEvent(KeyCode::Enter, Modifiers::ALT), Cmd::Newline);
    let printer = editor.create_external_printer()?;
    std::thread::spawn(move || read_terminal(editor, &out));
    Ok(Screen::Terminal(Box::new(printer)))
}

/// Ends when the input or the receiver does.
fn read_pipe(out: &mpsc::Sender<Input>) {
    let mut input = std::io::stdin().lock();
    let mut bytes = Vec::new();
    for number in 1_u64.. {
        bytes.clear();
        let line = match input.read_until(b'\n', &mut bytes) {
            Ok(0) => return,
            Ok(_) => text_of(&bytes, number),
            Err(e) => {
                let _ = out.blocking_send(Input::Unusable(format!("standard input: {e}")));
                return;
            }
        };
        if line.is_some_and(|line| out.blocking_send(line).is_err()) {
            return;
        }
    }
}

/// The text of a line of a pipe; `None` if it is empty.
fn text_of(bytes: &[u8], number: u64) -> Option<Input> {
    let line = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    match std::str::from_utf8(line) {
        Ok("") => None,
        Ok(text) => Some(Input::Text(text.to_owned())),
        Err(_) => Some(Input::Unusable(format!("line {number} is not UTF-8"))),
    }
}

fn read_terminal(mut editor: Editor<Keys, DefaultHistory>, out: &mpsc::Sender<Input>) {
    loop {
        let input = match editor.readline(PROMPT) {
            Ok(line) => {
                // The message is shown at its place in the order: not here, too.
                erase(
                    &line,
                    editor
                        .dimensions()
                        .map_or(80, |(columns, _)| columns.into()),
                );
                let _ = editor.add_history_entry(&line);
                input_of(line)
            }
            Err(ReadlineError::Io(e)) if e.kind() == ErrorKind::InvalidData => {
                Some(Input::Unusable("a character that is not UTF-8".into()))
            }
            Err(ReadlineError::Interrupted | ReadlineError::Eof) => return,
            Err(e) => {
                let _ = out.blocking_send(Input::Unusable(e.to_string()));
                return;
            }
        };
        if input.is_some_and(|input| out.blocking_send(input).is_err()) {
            return;
        }
    }
}

fn input_of(line: String) -> Option<Input> {
    match line.strip_prefix('/') {
        // A text that begins with a slash.
        Some(text) if text.starts_with('/') => Some(Input::Text(text.to_owned())),
        Some(command) => Some(Input::Command(command.trim().to_owned())),
        None if line.trim().is_empty() => None,
        None => Some(Input::Text(line)),
    }
}

/// Clears the rows that a line takes on the screen after Enter.
fn erase(line: &str, columns: usize) {
    let rows = rows(line, columns);
    let mut screen = std::io::stdout().lock();
    let _ = write!(screen, "\x1b[{rows}A\r\x1b[J");
    let _ = screen.flush();
}

/// The rows that a line takes behind the prompt.
fn rows(line: &str, columns: usize) -> usize {
    let columns = columns.max(1);
    let widths = line.split('\n').enumerate().map(|(n, part)| {
        let prompt = if n == 0 { PROMPT.len() } else { 0 };
        prompt + part.width()
    });
    widths.map(|width| width / columns + 1).sum()
}

/// Notices typing: the editor asks it for a hint at every key.
struct Keys(mpsc::Sender<Input>);

impl Hinter for Keys {
    type Hint = String;

    fn hint(&self, line: &str, _: usize, _: &rustyline::Context<'_>) -> Option<String> {
        if !line.is_empty() && !line.starts_with('/') {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_a_terminal_is_a_text_or_a_command() {
        for (line, expected) in [
            ("hello", Some(("text", "hello"))),
            (" two\nlines", Some(("text", " two\nlines"))),
            ("/quit ", Some(("command", "quit"))),
            ("//etc", Some(("text", "/etc"))),
            ("/", Some(("command", ""))),
            ("  ", None),
            ("", None),
        ] {
            let input = input_of(line.to_owned());
            let input = input.as_ref().map(|input| match input {
                Input::Text(text) => ("text", text.as_str()),
                Input::Command(command) => ("command", command.as_str()),
                Input::Key | Input::Unusable(_) => panic!("{line}"),
            });
            assert_eq!(input, expected, "{line:?}");
        }
    }

    #[test]
    fn every_row_of_a_typed_line_is_cleared() {
        for (line, expected) in [
            ("", 1),
            ("12345678", 2),
            ("1234567", 1),
            ("一二三四", 2),
            ("12345678901234567", 2),
            ("a\nb\n", 3),
        ] {
            assert_eq!(rows(line, 10), expected, "{line:?}");
        }
    }
}
