//! What the commands print. Text from others cannot steer the terminal.

use std::io::{ErrorKind, Write};

/// Prints a line. A closed pipe, as of `| head`, ends the command: the reader has all that it
/// wants.
///
/// # Errors
/// Any other failure to write.
pub fn line(text: &str) -> anyhow::Result<()> {
    match writeln!(std::io::stdout().lock(), "{text}") {
        Err(e) if e.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        written => Ok(written?),
    }
}

/// Prints a value as one line of JSON that cannot steer a terminal.
///
/// # Errors
/// As [`line`].
pub fn json<T: serde::Serialize>(value: &T) -> anyhow::Result<()> {
    line(&masked(&serde_json::to_string(value)?))
}

/// Prints a line of text to standard error.
pub fn note(text: &str) {
    eprintln!("{}", plain(text));
}

/// A text whose characters that steer are shown as a replacement character.
pub fn plain(text: &str) -> String {
    let shown = |c| if steers(c) { '\u{fffd}' } else { c };
    text.chars().map(shown).collect()
}

/// JSON whose characters that steer are escaped. JSON itself escapes those below U+0020; the others
/// occur in its strings only.
fn masked(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for c in json.chars() {
        if steers(c) {
            text += &format!("\\u{:04x}", u32::from(c));
        } else {
            text.push(c);
        }
    }
    text
}

/// Whether a character steers a terminal or the direction of its text.
fn steers(c: char) -> bool {
    let direction = matches!(
        c,
        '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
    );
    direction || c.is_control()
}

#[cfg(test)]
mod tests {
    #[test]
    fn json_that_is_printed_means_the_same_and_steers_nothing() {
        let text = "a\u{1b}[31m \u{85}\u{9b}2J\u{7f} \u{202e}dne\u{2069} äö€😀 \"q\" \\";
        let json = serde_json::to_string(text).unwrap();
        let masked = super::masked(&json);
        assert_eq!(serde_json::from_str::<String>(&masked).unwrap(), text);
        assert!(masked.contains("äö€😀"));
        let steers = |c: char| c.is_control() || ('\u{202a}'..='\u{202e}').contains(&c);
        assert!(!masked.chars().any(steers), "{masked:?}");
        let plain = super::plain(text);
        assert!(!plain.chars().any(steers), "{plain:?}");
        assert!(plain.starts_with("a\u{fffd}[31m ") && plain.contains("äö€😀"));
    }
}
