//! The text of `shards.toml` -> [`ShardsFile`]: the shards, states, weights and pins that an
//! operator asks for.

use super::dialog::DialogId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use toml::Spanned;

/// The largest weight. The ring has a thousand points for each unit.
const MAX_WEIGHT: u32 = 100;

/// A `shards.toml` that is valid by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardsFile {
    /// By name.
    pub shards: BTreeMap<String, ShardConfig>,
    /// Exceptions to the ring: the slot of a dialog, and the shard it is pinned to.
    pub pins: Vec<(DialogId, String)>,
    /// An optional number that the operator raises with every edit, so that an older file is
    /// rejected.
    pub version: Option<u64>,
    /// Permits declaring half of the active shards, or more, as down.
    pub force: bool,
}

/// One `[[shard]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardConfig {
    /// Its database.
    pub url: StoreUrl,
    /// Its share of the slots, relative to the other shards. 1 to 100.
    pub weight: u32,
    /// The state that the operator declares.
    pub state: DeclaredState,
    /// With `down`: the messages that only this shard has are forgotten.
    pub forget: bool,
}

/// The `state` of a `[[shard]]`, as the operator declares it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum DeclaredState {
    /// Takes its share of the slots.
    #[default]
    Active,
    /// Takes no slots; the slots that it owns move to other shards.
    Draining,
    /// Lost: other shards take over its slots without its data.
    Down,
}

/// A shard's database: `mysql://user:password@host:port/database` or `sqlite:path`. `Debug` never
/// prints the password.
#[derive(Clone, PartialEq, Eq)]
pub enum StoreUrl {
    /// A MySQL or MariaDB database.
    Mysql(String),
    /// A file. It is created if it does not exist.
    Sqlite(String),
}

impl StoreUrl {
    fn parse(url: &str) -> Option<Self> {
        if url.starts_with("mysql://") {
            Some(StoreUrl::Mysql(url.to_owned()))
        } else {
            url.strip_prefix("sqlite:")
                .filter(|path| !path.is_empty())
                .map(|path| StoreUrl::Sqlite(path.to_owned()))
        }
    }
}

impl fmt::Debug for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StoreUrl::Mysql(url) => {
                // user:password@ is between the scheme and the last @
                let rest = url.rsplit_once('@').map_or(url.as_str(), |(_, rest)| rest);
                write!(f, "mysql://…@{rest}")
            }
            StoreUrl::Sqlite(path) => write!(f, "sqlite:{path}"),
        }
    }
}

/// Why a file was rejected, in one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileError {
    /// The line of the file, from 1; `None` for an error of the file as a whole.
    pub line: Option<usize>,
    /// What is wrong, and how to fix it.
    pub reason: String,
}

impl std::error::Error for FileError {}

impl fmt::Display for FileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "line {line}: {}", self.reason),
            None => f.write_str(&self.reason),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    shard: Vec<FileShard>,
    #[serde(default)]
    pin: Vec<FilePin>,
    version: Option<u64>,
    #[serde(default)]
    force: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileShard {
    name: Spanned<String>,
    url: Spanned<String>,
    weight: Option<Spanned<i64>>,
    #[serde(default)]
    state: DeclaredState,
    forget: Option<Spanned<bool>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FilePin {
    dialog: Spanned<String>,
    shard: Spanned<String>,
}

impl ShardsFile {
    /// Reads the text of a `shards.toml`; `env` returns the value of a variable that a URL names as
    /// `${VAR}`.
    ///
    /// # Errors
    /// [`FileError`] with the line, for a text that is not TOML, an unknown key, a repeated or
    /// ill-formed name or URL, a missing variable, a weight outside 1 … 100, a pin to a shard that
    /// is not active, or no active shard.
    pub fn parse(text: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<Self, FileError> {
        let lines = Lines(text);
        let file: File = toml::from_str(text).map_err(|e| FileError {
            line: e.span().map(|span| lines.number(span.start)),
            reason: e.message().to_owned(),
        })?;
        let mut shards = BTreeMap::new();
        for entry in file.shard {
            let (name, shard) = parse_shard(entry, &shards, lines, env)?;
            shards.insert(name, shard);
        }
        let mut states = shards.values().map(|shard: &ShardConfig| shard.state);
        if !states.any(|state| state == DeclaredState::Active) {
            return Err(FileError {
                line: None,
                reason: "no active shard; at least one [[shard]] must have state = \"active\""
                    .into(),
            });
        }
        let pins = file
            .pin
            .into_iter()
            .map(|pin| parse_pin(pin, &shards, lines));
        Ok(Self {
            pins: pins.collect::<Result<_, _>>()?,
            shards,
            version: file.version,
            force: file.force,
        })
    }
}

/// The text, for the numbers of lines.
#[derive(Clone, Copy)]
struct Lines<'a>(&'a str);

impl Lines<'_> {
    /// The number of the line, from 1, that a byte is on.
    fn number(self, offset: usize) -> usize {
        let before = &self.0.as_bytes()[..offset.min(self.0.len())];
        1 + before.iter().filter(|b| **b == b'\n').count()
    }

    fn error(self, at: Range<usize>, reason: impl Into<String>) -> FileError {
        FileError {
            line: Some(self.number(at.start)),
            reason: reason.into(),
        }
    }
}

/// Checks one `[[shard]]` against those above it.
fn parse_shard(
    entry: FileShard,
    above: &BTreeMap<String, ShardConfig>,
    lines: Lines<'_>,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<(String, ShardConfig), FileError> {
    let FileShard {
        name,
        url,
        weight,
        state,
        forget,
    } = entry;
    let at = name.span();
    let name = name.into_inner();
    if !is_name(&name) {
        let reason =
            format!("'{name}' is no name for a shard: use 1 to 64 of a-z, A-Z, 0-9, '-' and '_'");
        return Err(lines.error(at, reason));
    }
    if above.contains_key(&name) {
        let reason = format!("a second shard named {name}; every name is used once");
        return Err(lines.error(at, reason));
    }
    let shard = ShardConfig {
        url: parse_url(&name, url, above, lines, env)?,
        weight: parse_weight(&name, weight, lines)?,
        state,
        forget: forget.as_ref().is_some_and(|forget| *forget.get_ref()),
    };
    if let Some(forget) = forget
        && shard.forget
        && state != DeclaredState::Down
    {
        let reason = format!(
            "forget = true of {name} belongs beside state = \"down\": it forgets the messages of a shard that will not return"
        );
        return Err(lines.error(forget.span(), reason));
    }
    Ok((name, shard))
}

fn parse_url(
    name: &str,
    url: Spanned<String>,
    above: &BTreeMap<String, ShardConfig>,
    lines: Lines<'_>,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<StoreUrl, FileError> {
    let error = |reason: String| lines.error(url.span(), reason);
    let expanded = expand(url.get_ref(), env);
    let expanded = expanded.map_err(|reason| error(format!("the url of {name} {reason}")))?;
    let parsed = StoreUrl::parse(&expanded).ok_or_else(|| {
        error(format!(
            "the url of {name} must begin with mysql:// or be sqlite: and a path"
        ))
    })?;
    match above.iter().find(|(_, shard)| shard.url == parsed) {
        Some((other, _)) => Err(error(format!(
            "{name} and {other} have the same url; every shard needs a database of its own"
        ))),
        None => Ok(parsed),
    }
}

fn parse_weight(
    name: &str,
    weight: Option<Spanned<i64>>,
    lines: Lines<'_>,
) -> Result<u32, FileError> {
    let Some(weight) = weight else { return Ok(1) };
    match u32::try_from(*weight.get_ref()) {
        Ok(weight) if (1..=MAX_WEIGHT).contains(&weight) => Ok(weight),
        Ok(_) | Err(_) => {
            let reason = format!(
                "weight {} of {name} must be from 1 to {MAX_WEIGHT}; to empty a shard, set state = \"draining\"",
                weight.get_ref()
            );
            Err(lines.error(weight.span(), reason))
        }
    }
}

/// Checks one `[[pin]]`.
fn parse_pin(
    FilePin { dialog, shard }: FilePin,
    shards: &BTreeMap<String, ShardConfig>,
    lines: Lines<'_>,
) -> Result<(DialogId, String), FileError> {
    let id: DialogId = dialog
        .get_ref()
        .parse()
        .map_err(|e| lines.error(dialog.span(), format!("pin '{}': {e}", dialog.get_ref())))?;
    let (at, target) = (shard.span(), shard.into_inner());
    match shards.get(&target).map(|shard| shard.state) {
        Some(DeclaredState::Active) => Ok((id, target)),
        Some(DeclaredState::Draining | DeclaredState::Down) => {
            let reason = format!("the pin of {id} names {target}, which is not active");
            Err(lines.error(at, reason))
        }
        None => {
            let reason = format!("the pin of {id} names {target}, and there is no such shard");
            Err(lines.error(at, reason))
        }
    }
}

fn is_name(name: &str) -> bool {
    (1..=64).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}

/// Replaces each `${VAR}` by its value.
fn expand(url: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<String, String> {
    let mut out = String::new();
    let mut rest = url;
    while let Some((before, after)) = rest.split_once("${") {
        let (name, behind) = after.split_once('}').ok_or("has a ${ without its }")?;
        out.push_str(before);
        out.push_str(
            &env(name).ok_or_else(|| {
                format!("needs the environment variable {name}, which is not set")
            })?,
        );
        rest = behind;
    }
    out.push_str(rest);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = include_str!("../../../shards.toml");

    fn env(name: &str) -> Option<String> {
        (name == "SHARD_PASSWORD").then(|| "s3cret".to_owned())
    }

    fn refusal(text: &str) -> String {
        ShardsFile::parse(text, &env).unwrap_err().to_string()
    }

    #[test]
    fn the_file_that_is_shipped_is_good() {
        let file = ShardsFile::parse(GOOD, &env).unwrap();
        assert_eq!(
            file.shards.keys().collect::<Vec<_>>(),
            ["shard1", "shard2", "shard3", "shard4"]
        );
    }

    #[test]
    fn a_bad_file_is_refused_with_the_line_that_is_wrong() {
        let shard = |name: &str, more: &str| {
            format!("[[shard]]\nname = \"{name}\"\nurl = \"sqlite:{name}.db\"\n{more}\n")
        };
        for (text, expected) in [
            (String::new(), "no active shard"),
            ("[[shard]\n".into(), "line 1: "),
            ("[[shard]]\nname = \"a\"\n".into(), "missing field `url`"),
            (shard("a", "colour = 1"), "line 4: unknown field `colour`"),
            (
                shard("a", "") + &shard("a", "").replace("a.db", "b.db"),
                "line 6: a second shard named a",
            ),
            (
                shard("a", "") + &shard("b", "").replace("b.db", "a.db"),
                "line 7: b and a have the same url",
            ),
            (
                shard("a", "weight = 0"),
                "line 4: weight 0 of a must be from 1",
            ),
            (
                shard("a", "weight = -1"),
                "line 4: weight -1 of a must be from 1",
            ),
            (
                shard("a", "weight = 1000000"),
                "line 4: weight 1000000 of a",
            ),
            (
                shard("a", "state = \"sleepy\""),
                "line 4: unknown variant `sleepy`",
            ),
            (shard("a", "state = \"draining\""), "no active shard"),
            (shard("a b", ""), "line 2: 'a b' is no name"),
            (
                shard("a", "").replace("sqlite:", "postgres:"),
                "line 3: the url of a must begin with",
            ),
            (
                shard("a", "").replace("a.db", "${NOPE}"),
                "line 3: the url of a needs the environment variable NOPE",
            ),
            (
                shard("a", "").replace("a.db", "${NOPE"),
                "line 3: the url of a has a ${ without its }",
            ),
            (
                shard("a", "[[pin]]\ndialog = \"7_42\"\nshard = \"b\""),
                "line 6: the pin of 7_42 names b, and there is no",
            ),
            (
                shard("a", "[[pin]]\ndialog = \"42_7\"\nshard = \"a\""),
                "line 5: pin '42_7'",
            ),
        ] {
            assert!(
                refusal(&text).contains(expected),
                "{text}\n→ {}",
                refusal(&text)
            );
        }
    }

    #[test]
    fn no_prefix_of_the_file_panics_and_a_cut_one_never_parses_as_more_than_it_has() {
        for end in (0..GOOD.len()).filter(|end| GOOD.is_char_boundary(*end)) {
            if let Ok(cut) = ShardsFile::parse(&GOOD[..end], &env) {
                assert!(cut.shards.len() <= 4);
            }
        }
    }

    #[test]
    fn a_password_is_never_shown() {
        let shown = format!("{:?}", ShardsFile::parse(GOOD, &env).unwrap());
        assert!(
            !shown.contains("s3cret") && shown.contains("shard1:3306"),
            "{shown}"
        );
    }
}
