//! The text of `shards.toml` -> [`Topology`], and the [`Document`] that the shards keep of it: names, states, weights and
//! pins, never a URL.

use crate::dialog::DialogId;
use crate::ring::Placement;
use serde::{Deserialize, Serialize};
use siphasher::sip128::{Hasher128, SipHasher24};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::hash::Hasher;
use toml::Spanned;

/// The largest weight: a thousand points each for the ring to sort.
const MAX_WEIGHT: i64 = 100;

/// A `shards.toml` that was read and makes sense in itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topology {
    /// By name.
    pub shards: BTreeMap<String, Shard>,
    /// Exceptions to the ring: the slot of a dialog, and the shard it is pinned to.
    pub pins: Vec<(DialogId, String)>,
    /// A number that the operator raises with every edit, if he likes: an older file is then refused.
    pub version: Option<u64>,
    /// Allows half of the active shards, or more, to be declared down.
    pub force: bool,
}

/// One `[[shard]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shard {
    /// Where its database is.
    pub url: StoreUrl,
    /// Its share relative to the others'.
    pub weight: u32,
    /// What the operator wants of it.
    pub state: ShardState,
    /// Beside `down`: whatever it alone holds is written off.
    pub forget: bool,
}

/// The `state` of a `[[shard]]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum ShardState {
    /// Takes its share of the slots.
    #[default]
    Active,
    /// Off the ring: its slots are wanted elsewhere.
    Draining,
    /// Given up: others take its slots over without it.
    Down,
}

/// A shard's database: `mysql://user:password@host:port/database` or `sqlite:path`. Holds a password, and never shows it.
#[derive(Clone, PartialEq, Eq)]
pub enum StoreUrl {
    /// A MySQL or MariaDB database.
    Mysql(String),
    /// A file, made when it is missing.
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
                // user:password@ lies between the scheme and the last @
                let rest = url.rsplit_once('@').map_or(url.as_str(), |(_, rest)| rest);
                write!(f, "mysql://…@{rest}")
            }
            StoreUrl::Sqlite(path) => write!(f, "sqlite:{path}"),
        }
    }
}

/// Why a file was refused: one line that says what and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadFile {
    /// The line of the file, from 1, where one is to blame.
    pub line: Option<usize>,
    /// What is wrong and how to mend it.
    pub what: String,
}

impl std::error::Error for BadFile {}

impl fmt::Display for BadFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "line {line}: {}", self.what),
            None => f.write_str(&self.what),
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
    state: ShardState,
    forget: Option<Spanned<bool>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FilePin {
    dialog: Spanned<String>,
    shard: Spanned<String>,
}

impl Topology {
    /// Reads the text of a `shards.toml`; `env` answers for `${VAR}` in a URL.
    ///
    /// # Errors
    /// [`BadFile`] with the line, for a text that is not TOML, an unknown key, a doubled or ill-formed name, a doubled or
    /// ill-formed URL, a missing variable, a weight outside 1 … 100, a pin to nowhere, or no active shard.
    pub fn parse(text: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<Self, BadFile> {
        let line_of = |offset: usize| {
            Some(
                1 + text.as_bytes()[..offset.min(text.len())]
                    .iter()
                    .filter(|b| **b == b'\n')
                    .count(),
            )
        };
        let bad = |at: std::ops::Range<usize>, what: String| BadFile {
            line: line_of(at.start),
            what,
        };
        let file: File = toml::from_str(text).map_err(|e| BadFile {
            line: e.span().and_then(|span| line_of(span.start)),
            what: e.message().to_owned(),
        })?;

        let mut shards = BTreeMap::<String, Shard>::new();
        for FileShard {
            name,
            url,
            weight,
            state,
            forget,
        } in file.shard
        {
            let at = name.span();
            let name = name.into_inner();
            if !is_name(&name) {
                return Err(bad(
                    at,
                    format!(
                        "'{name}' is no name for a shard: use 1 to 64 of a-z, A-Z, 0-9, '-' and '_'"
                    ),
                ));
            }
            let url_at = url.span();
            let expanded = expand(url.get_ref(), env)
                .map_err(|what| bad(url_at.clone(), format!("the url of {name} {what}")))?;
            let url = StoreUrl::parse(&expanded).ok_or_else(|| {
                bad(
                    url_at.clone(),
                    format!("the url of {name} must begin with mysql:// or be sqlite: and a path"),
                )
            })?;
            if let Some((other, _)) = shards.iter().find(|(_, shard)| shard.url == url) {
                return Err(bad(
                    url_at,
                    format!(
                        "{name} and {other} have the same url; every shard needs a database of its own"
                    ),
                ));
            }
            let weight = match weight {
                None => 1,
                Some(weight) if (1..=MAX_WEIGHT).contains(weight.get_ref()) => {
                    *weight.get_ref() as u32
                }
                Some(weight) => {
                    let what = format!(
                        "weight {} of {name} must be from 1 to {MAX_WEIGHT}; to empty a shard, set state = \"draining\"",
                        weight.get_ref()
                    );
                    return Err(bad(weight.span(), what));
                }
            };
            if let Some(forget) = &forget
                && *forget.get_ref()
                && state != ShardState::Down
            {
                let what = format!(
                    "forget = true of {name} belongs beside state = \"down\": it writes off what a shard held that will not return"
                );
                return Err(bad(forget.span(), what));
            }
            let forget = forget.is_some_and(Spanned::into_inner);
            let shard = Shard {
                url,
                weight,
                state,
                forget,
            };
            if shards.insert(name.clone(), shard).is_some() {
                return Err(bad(
                    at,
                    format!("a second shard named {name}; every name is used once"),
                ));
            }
        }
        if !shards
            .values()
            .any(|shard| shard.state == ShardState::Active)
        {
            return Err(BadFile {
                line: None,
                what: "no active shard; at least one [[shard]] must have state = \"active\"".into(),
            });
        }

        let mut pins = Vec::new();
        for FilePin { dialog, shard } in file.pin {
            let id: DialogId = dialog
                .get_ref()
                .parse()
                .map_err(|e| bad(dialog.span(), format!("pin '{}': {e}", dialog.get_ref())))?;
            let target = shard.get_ref();
            match shards.get(target) {
                Some(found) if found.state == ShardState::Active => pins.push((id, target.clone())),
                Some(_) => {
                    return Err(bad(
                        shard.span(),
                        format!("the pin of {id} names {target}, which is not active"),
                    ));
                }
                None => {
                    return Err(bad(
                        shard.span(),
                        format!("the pin of {id} names {target}, and there is no such shard"),
                    ));
                }
            }
        }
        Ok(Self {
            shards,
            pins,
            version: file.version,
            force: file.force,
        })
    }

    /// What the shards keep of this file when they are founded with it.
    #[must_use]
    pub fn document(&self) -> Document {
        let member = |shard: &Shard| Member {
            state: shard.state,
            weight: shard.weight,
            down_generation: 0,
            forget: shard.forget,
        };
        let pin = |(dialog, shard): &(DialogId, String)| Pin {
            dialog: dialog.to_string(),
            shard: shard.clone(),
        };
        Document {
            algorithm: crate::ring::ALGORITHM.to_owned(),
            generation: 0,
            shards: self
                .shards
                .iter()
                .map(|(name, shard)| (name.clone(), member(shard)))
                .collect(),
            pins: self.pins.iter().map(pin).collect(),
            file_version: self.version,
            retired: BTreeSet::new(),
            earlier: Vec::new(),
            paused: false,
            lineage: Vec::new(),
        }
    }
}

fn is_name(name: &str) -> bool {
    (1..=64).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}

/// Puts the values of `${VAR}` in their places.
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

/// What every shard keeps of the topology. Two instances agree on it by `hash`; no URL and no secret is in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Document {
    /// How dialogs are placed; see [`crate::ring::ALGORITHM`].
    pub algorithm: String,
    /// Counts the times a shard was declared down.
    pub generation: u32,
    /// By name.
    pub shards: BTreeMap<String, Member>,
    /// Exceptions to the ring.
    pub pins: Vec<Pin>,
    /// The `version` of the file, where one is used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file_version: Option<u64>,
    /// Names of shards that were removed. They are never given to another database.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub retired: BTreeSet<String>,
    /// What earlier files said, by [`Document::fingerprint`], the latest last: a file that is only old is not an edit.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub earlier: Vec<String>,
    /// Moves stand still until the operator resumes them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub paused: bool,
    /// The documents that it was made from, by version and hash, the latest last. A shard takes it only if its own is among
    /// them: what was decided without knowing of a document must not undo it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lineage: Vec<(u64, String)>,
}

/// A shard, as the document knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// What the operator wants of it.
    pub state: ShardState,
    /// Its share relative to the others'.
    pub weight: u32,
    /// The generation in which it was last declared down.
    pub down_generation: u32,
    /// What it alone holds is written off.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub forget: bool,
}

/// A pin, as the document knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pin {
    /// The dialog whose slot is pinned.
    pub dialog: String,
    /// The shard it is pinned to.
    pub shard: String,
}

/// How many earlier files a document remembers.
const EARLIER: usize = 64;

/// How many documents it knows that it was made from.
const LINEAGE: usize = 64;

/// What a shard that is to leave the document still has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Held {
    /// It cannot be asked, and why.
    Unknown(String),
    /// So many slots that are not `none`, and so many slots with rows.
    Slots {
        /// Owned, sealed, incoming or fenced.
        slots: usize,
        /// With rows that are still to be purged.
        with_rows: usize,
    },
}

impl Document {
    /// The next document, if the operator may go from this one to `file`. `judging` says that shards declared down are
    /// still being judged, `held` what a shard that vanished from the file still has.
    ///
    /// # Errors
    /// [`BadFile`] that says what stands in the way; nothing has changed.
    pub fn next(
        &self,
        file: &Topology,
        judging: bool,
        held: &dyn Fn(&str) -> Held,
    ) -> Result<(Document, bool), BadFile> {
        let bad = |what: String| Err(BadFile { line: None, what });
        if let (Some(known), Some(new)) = (self.file_version, file.version)
            && new <= known
            && self.difference(&file.document()).is_some()
        {
            return bad(format!(
                "version = {new}, but version {known} is in force: raise it above that with every edit"
            ));
        }
        let mut next = file.document();
        next.generation = self.generation;
        next.paused = self.paused;
        next.lineage = self.lineage.clone();
        next.retired = self.retired.clone();
        for (name, member) in self
            .shards
            .iter()
            .filter(|(name, _)| !next.shards.contains_key(*name))
        {
            match (member.state, held(name)) {
                (ShardState::Active, _) => {
                    return bad(format!(
                        "{name} is gone from the file but active: set state = \"draining\", and remove it once it is drained"
                    ));
                }
                (ShardState::Down, _) if !member.forget => {
                    return bad(format!(
                        "{name} is gone from the file but down, and may hold messages: bring it back, or give them up with forget = true"
                    ));
                }
                (ShardState::Draining, Held::Unknown(why)) => {
                    return bad(format!(
                        "{name} is gone from the file and cannot be asked whether it is drained: {why}"
                    ));
                }
                (ShardState::Draining, Held::Slots { slots, with_rows })
                    if slots + with_rows > 0 =>
                {
                    return bad(format!(
                        "{name} is gone from the file but still owns {slots} slots and holds rows of {with_rows}: leave it in as \"draining\" until it is drained"
                    ));
                }
                (ShardState::Draining | ShardState::Down, _) => {}
            }
            next.retired.insert(name.clone());
        }
        let mut newly_down = false;
        for (name, member) in &mut next.shards {
            let known = self.shards.get(name);
            member.down_generation = known.map_or(0, |known| known.down_generation);
            if member.state == ShardState::Down {
                match known {
                    None => return bad(format!("{name} is new and cannot be down")),
                    Some(known) if known.state != ShardState::Down => {
                        newly_down = true;
                        member.down_generation = self.generation + 1;
                    }
                    Some(_) => {}
                }
            }
        }
        if newly_down {
            next.generation += 1;
        }
        // Of any two documents that are made from this one, at most one can come in force: their shards overlap.
        let active = |(_, member): &(&String, &Member)| member.state == ShardState::Active;
        let active: Vec<&String> = self
            .shards
            .iter()
            .filter(active)
            .map(|(name, _)| name)
            .collect();
        let left = active
            .iter()
            .filter(|name| next.live().any(|live| live == **name))
            .count();
        if newly_down && left * 2 <= active.len() && !file.force {
            return bad(format!(
                "only {left} of {} active shards would be left; if that is meant, and nobody else edits at the same time, add force = true at the top of the file",
                active.len()
            ));
        }
        next.earlier = self.earlier.clone();
        next.earlier.push(self.fingerprint());
        let surplus = next.earlier.len().saturating_sub(EARLIER);
        next.earlier.drain(..surplus);
        Ok((next, newly_down || judging))
    }

    /// Whether it was made from that document, directly or not. One that is older than all it knows of may be such a one.
    #[must_use]
    pub fn stands_above(&self, version: u64, hash: &str) -> bool {
        let oldest = self.lineage.first().map_or(0, |(oldest, _)| *oldest);
        (self.lineage.len() >= LINEAGE && version < oldest)
            || self
                .lineage
                .iter()
                .any(|(of, known)| (*of, known.as_str()) == (version, hash))
    }

    /// Notes that it was made from that document.
    pub fn put_above(&mut self, version: u64, hash: &str) {
        self.lineage.push((version, hash.to_owned()));
        self.lineage.sort();
        self.lineage.dedup();
        let surplus = self.lineage.len().saturating_sub(LINEAGE);
        self.lineage.drain(..surplus);
    }

    /// Whether `file` is one that was in force before: an instance that starts with it has not seen an edit.
    #[must_use]
    pub fn remembers(&self, file: &Document) -> bool {
        self.earlier.contains(&file.fingerprint())
    }

    /// 32 hex digits over what a file says: the shards with state and weight, and the pins.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        let shards: Vec<_> = self
            .shards
            .iter()
            .map(|(name, member)| (name, member.state, member.weight, member.forget))
            .collect();
        // Strings, numbers and booleans always become JSON.
        let text = serde_json::to_string(&(shards, &self.pins)).unwrap_or_default();
        digest(&text)
    }

    /// Names of the members that are not declared down.
    pub fn live(&self) -> impl Iterator<Item = &str> {
        let live = |(_, member): &(&String, &Member)| member.state != ShardState::Down;
        self.shards
            .iter()
            .filter(live)
            .map(|(name, _)| name.as_str())
    }

    /// Names of the members that are declared down.
    pub fn down(&self) -> impl Iterator<Item = &str> {
        let down = |(_, member): &(&String, &Member)| member.state == ShardState::Down;
        self.shards
            .iter()
            .filter(down)
            .map(|(name, _)| name.as_str())
    }

    /// 32 hex digits over the content: equal for equal documents.
    #[must_use]
    pub fn hash(&self) -> String {
        digest(&self.to_json())
    }

    /// The canonical text: maps in key order, fields in the order of this type.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("a document has only strings for keys")
    }

    /// The wanted shard of every slot; `None` when no shard is active or a pin names none of them.
    #[must_use]
    pub fn placement(&self) -> Option<Placement> {
        let weights = self
            .shards
            .iter()
            .filter(|(_, member)| member.state == ShardState::Active)
            .map(|(name, member)| (name.clone(), member.weight))
            .collect();
        let pins: Vec<_> = self
            .pins
            .iter()
            .map(|pin| Some((pin.dialog.parse().ok()?, pin.shard.clone())))
            .collect::<Option<_>>()?;
        Placement::new(&weights, &pins)
    }

    /// In one line, how a file's document differs from this one; `None` if it does not.
    #[must_use]
    pub fn difference(&self, file: &Document) -> Option<String> {
        let mut parts = Vec::new();
        for (name, member) in &file.shards {
            match self.shards.get(name) {
                None => parts.push(format!("{name} is new")),
                Some(known) if known.state != member.state => {
                    parts.push(format!("{name} becomes {:?}", member.state).to_lowercase())
                }
                Some(known) if known.weight != member.weight => {
                    parts.push(format!("{name} weighs {}", member.weight))
                }
                Some(known) if known.forget != member.forget => {
                    parts.push(format!("{name} is to be forgotten"))
                }
                Some(_) => {}
            }
        }
        parts.extend(
            self.shards
                .keys()
                .filter(|name| !file.shards.contains_key(*name))
                .map(|name| format!("{name} is gone")),
        );
        if self.pins != file.pins {
            parts.push("the pins differ".to_owned());
        }
        (!parts.is_empty()).then(|| parts.join(", "))
    }
}

fn digest(text: &str) -> String {
    let mut hasher = SipHasher24::new();
    hasher.write(text.as_bytes());
    format!("{:032x}", hasher.finish128().as_u128())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = include_str!("../../shards.toml");

    fn env(name: &str) -> Option<String> {
        (name == "SHARD_PASSWORD").then(|| "s3cret".to_owned())
    }

    fn refusal(text: &str) -> String {
        Topology::parse(text, &env).unwrap_err().to_string()
    }

    #[test]
    fn the_file_that_is_shipped_is_good() {
        let topology = Topology::parse(GOOD, &env).unwrap();
        assert_eq!(
            topology.shards.keys().collect::<Vec<_>>(),
            ["shard1", "shard2", "shard3", "shard4"]
        );
        assert!(topology.document().placement().is_some());
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
            if let Ok(cut) = Topology::parse(&GOOD[..end], &env) {
                assert!(cut.shards.len() <= 4);
            }
        }
    }

    #[test]
    fn a_password_is_never_shown() {
        let shown = format!("{:?}", Topology::parse(GOOD, &env).unwrap());
        assert!(
            !shown.contains("s3cret") && shown.contains("shard1:3306"),
            "{shown}"
        );
        let document = Topology::parse(GOOD, &env).unwrap().document().to_json();
        assert!(
            !document.contains("s3cret") && !document.contains("3306"),
            "{document}"
        );
    }

    #[test]
    fn a_document_tells_how_a_file_differs_from_it() {
        let document = Topology::parse(GOOD, &env).unwrap().document();
        assert_eq!(document.difference(&document), None);
        let edited = GOOD.replacen(
            "name = \"shard4\"",
            "state = \"draining\"\nname = \"shard9\"",
            1,
        );
        let difference = document
            .difference(&Topology::parse(&edited, &env).unwrap().document())
            .unwrap();
        assert_eq!(difference, "shard9 is new, shard4 is gone");
    }

    fn shards(states: &[(&str, &str)]) -> Topology {
        let entry = |(name, more): &(&str, &str)| {
            format!("[[shard]]\nname = \"{name}\"\nurl = \"sqlite:{name}\"\n{more}\n")
        };
        Topology::parse(&states.iter().map(entry).collect::<String>(), &|_| None).unwrap()
    }

    /// Two documents that are made from one, each giving other shards up, must share a shard: else both come in force.
    #[test]
    fn more_than_half_of_the_active_shards_must_be_left() {
        let (down, draining) = ("state = \"down\"", "state = \"draining\"");
        for (before, after, allowed) in [
            (["", "", "", ""], [down, "", "", ""], true),
            (["", "", "", ""], [down, down, "", ""], false),
            (["", "", "", ""], [down, down, down, ""], false),
            // One that is drained has no say.
            (
                ["", "", draining, draining],
                [down, "", draining, draining],
                false,
            ),
            (["", "", "", draining], [down, "", "", draining], true),
            // What is down already is not declared down again.
            ([down, down, "", ""], [down, down, "", ""], true),
            ([down, "", "", ""], [down, "", draining, ""], true),
        ] {
            let with = |states: [&'static str; 4]| ["a", "b", "c", "d"].into_iter().zip(states);
            let of = |states| shards(&with(states).collect::<Vec<_>>());
            let (document, mut file) = (of(before).document(), of(after));
            let held = |_: &str| Held::Unknown("nobody asks".into());
            let next = document.next(&file, false, &held);
            assert_eq!(next.is_ok(), allowed, "{before:?} {after:?}: {next:?}");
            file.force = true;
            assert!(document.next(&file, false, &held).is_ok());
        }
    }

    #[test]
    fn a_document_knows_what_it_was_made_from_and_takes_what_is_older_for_it() {
        let mut document = shards(&[("a", "")]).document();
        assert!(!document.stands_above(1, "h1"));
        for version in 1..=LINEAGE as u64 {
            document.put_above(version, &format!("h{version}"));
        }
        assert!(document.stands_above(1, "h1") && !document.stands_above(1, "other"));
        document.put_above(LINEAGE as u64 + 1, "next");
        assert_eq!(document.lineage.len(), LINEAGE);
        assert!(document.stands_above(1, "forgotten") && document.stands_above(2, "h2"));
        assert!(!document.stands_above(2, "other"));
        assert_eq!(
            serde_json::from_str::<Document>(&document.to_json()).unwrap(),
            document
        );
    }
}
