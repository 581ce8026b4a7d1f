//! Two documents that are proposed at once can each be accepted by some of the shards. Which of them is put above both is
//! decided by what the shards have, never by who looks: one that may be in force already must not be lost, because slots may
//! have been claimed by it.
//!
//! A document is in force when every shard that it does not declare down has accepted it, and a shard accepts only what stands
//! above the document it has. So one that a rival keeps from a single one of its shards is not in force and never will be. Two
//! that both may be must share a shard that has neither yet, because each keeps more than half of the active shards
//! (`Document::next`); that one is asked.

use crate::store::{Meta, Phase, StoreError};
use crate::topology::Document;
use std::collections::BTreeMap;

/// What the shards that answered have, by name.
pub type Found = BTreeMap<String, (Meta, Document)>;

/// What is to be done about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// One document stands above all others.
    Agreed(Meta, Document),
    /// This one is to be put in force: it stands above all, and says what the one says that may be in force.
    Settle(Meta, Document),
    /// Several may be in force; this shard has none of them yet, and decides by what it takes.
    Ask(String, Meta),
    /// Several may be in force, until one of these shards answers.
    Wait(Vec<String>),
}

/// Reads the documents of the shards that answered.
///
/// # Errors
/// [`StoreError::Refused`] for one that cannot be read.
pub fn read(metas: Vec<(String, Meta)>) -> Result<Found, StoreError> {
    let read = |(name, meta): (String, Meta)| {
        let document = meta.document()?;
        Ok((name, (meta, document)))
    };
    metas.into_iter().map(read).collect()
}

/// Decides; `None` if no shard has answered.
#[must_use]
pub fn decide(found: &Found) -> Option<Verdict> {
    let above = |a: &(Meta, Document), b: &(Meta, Document)| {
        a.1.stands_above(b.0.doc_version, &b.0.doc_hash)
    };
    let same = |a: &Meta, b: &Meta| (a.doc_version, &a.doc_hash) == (b.doc_version, &b.doc_hash);
    let mut heads: Vec<&(Meta, Document)> = Vec::new();
    for one in found.values() {
        if !found.values().any(|other| above(other, one)) {
            match heads.iter_mut().find(|head| same(&head.0, &one.0)) {
                Some(head) if head.0.doc_phase < one.0.doc_phase => *head = one,
                Some(_) => {}
                None => heads.push(one),
            }
        }
    }
    // Whoever looks takes them in the same order.
    heads.sort_by_key(|(meta, _)| (std::cmp::Reverse(meta.doc_version), meta.doc_hash.clone()));
    let (newest, document) = heads.first()?;
    if heads.len() == 1 {
        return Some(Verdict::Agreed(newest.clone(), document.clone()));
    }
    let may_be_in_force = |head: &&&(Meta, Document)| {
        head.1.live().all(|name| {
            found
                .get(name)
                .is_none_or(|there| same(&there.0, &head.0) || above(head, there))
        })
    };
    let alive: Vec<&&(Meta, Document)> = heads.iter().filter(may_be_in_force).collect();
    let kept = match alive[..] {
        [] => heads[0],
        [only] => only,
        [first, second, ..] => {
            let shared: Vec<&str> = first
                .1
                .live()
                .filter(|name| second.1.live().any(|other| other == *name))
                .collect();
            let silent = |name: &&str| !found.contains_key(*name);
            return Some(match shared.iter().find(|name| !silent(name)) {
                Some(name) => Verdict::Ask((*name).to_owned(), first.0.clone()),
                None => Verdict::Wait(shared.into_iter().map(str::to_owned).collect()),
            });
        }
    };
    let mut document = kept.1.clone();
    for (meta, rival) in &heads {
        for (version, hash) in &rival.lineage {
            document.put_above(*version, hash);
        }
        document.put_above(meta.doc_version, &meta.doc_hash);
    }
    let meta = Meta {
        doc_version: newest.doc_version + 1,
        doc_phase: kept.0.doc_phase.max(Phase::Adjudicate),
        doc_hash: document.hash(),
        doc: document.to_json(),
        ..kept.0.clone()
    };
    Some(Verdict::Settle(meta, document))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::{ShardState, Topology};

    fn document(down: &[&str]) -> Document {
        let text: String = ["a", "b", "c"]
            .map(|name| format!("[[shard]]\nname = \"{name}\"\nurl = \"sqlite:{name}\"\n"))
            .concat();
        let mut document = Topology::parse(&text, &|_| None).unwrap().document();
        for name in down {
            document.shards.get_mut(*name).unwrap().state = ShardState::Down;
        }
        document
    }

    fn meta(version: u64, phase: Phase, document: &Document) -> (Meta, Document) {
        let meta = Meta {
            cluster_id: "c".into(),
            shard_name: "any".into(),
            slot_algorithm: "s".into(),
            doc_version: version,
            doc_phase: phase,
            doc_hash: document.hash(),
            doc: document.to_json(),
        };
        (meta, document.clone())
    }

    fn child(of: &(Meta, Document), mut document: Document, phase: Phase) -> (Meta, Document) {
        document.lineage = of.1.lineage.clone();
        document.put_above(of.0.doc_version, &of.0.doc_hash);
        meta(of.0.doc_version + 1, phase, &document)
    }

    fn found(what: &[(&str, &(Meta, Document))]) -> Found {
        what.iter()
            .map(|(name, one)| ((*name).to_owned(), (*one).clone()))
            .collect()
    }

    #[test]
    fn the_document_that_may_be_in_force_is_kept() {
        let first = meta(1, Phase::Normal, &document(&[]));
        let lost = child(&first, document(&["a"]), Phase::Adjudicate);
        let mut weighed = document(&[]);
        weighed.shards.get_mut("b").unwrap().weight = 2;
        let weighed = child(&first, weighed, Phase::Normal);

        // Whoever is behind is brought up.
        for shards in [
            &[("a", &first), ("b", &first)][..],
            &[("a", &first), ("b", &weighed), ("c", &first)],
        ] {
            let newest = shards
                .iter()
                .map(|(_, one)| *one)
                .max_by_key(|one| one.0.doc_version);
            let (meta, document) = newest.unwrap().clone();
            let verdict = decide(&found(shards)).unwrap();
            assert_eq!(verdict, Verdict::Agreed(meta, document));
        }

        // Both shards that the one needs have it: it is in force, and what `a` took instead never is.
        let kept = |shards: &[(&str, &(Meta, Document))], of: &Document| {
            let Some(Verdict::Settle(meta, document)) = decide(&found(shards)) else {
                panic!("{:?}", decide(&found(shards)));
            };
            assert_eq!(meta.doc_version, 3);
            assert_eq!((&document.shards, &document.pins), (&of.shards, &of.pins));
            for (_, one) in shards {
                assert!(document.stands_above(one.0.doc_version, &one.0.doc_hash));
            }
            meta.doc_phase
        };
        let taken = [("a", &weighed), ("b", &lost), ("c", &lost)];
        assert_eq!(kept(&taken, &lost.1), Phase::Adjudicate);
        // It may be, as far as can be seen.
        kept(&[("a", &weighed), ("b", &lost), ("c", &first)], &lost.1);
        kept(&[("a", &weighed), ("b", &lost)], &lost.1);
        // And here the other may be.
        kept(
            &[("a", &weighed), ("b", &weighed), ("c", &lost)],
            &weighed.1,
        );

        // Two that lost different shards: whom they share decides.
        let other = child(&first, document(&["b"]), Phase::Adjudicate);
        let both = [("a", &other), ("b", &lost)];
        assert_eq!(
            decide(&found(&both)),
            Some(Verdict::Wait(vec!["c".to_owned()]))
        );
        let asked = found(&[("a", &other), ("b", &lost), ("c", &first)]);
        assert!(matches!(decide(&asked), Some(Verdict::Ask(name, _)) if name == "c"));
        kept(&[("a", &other), ("b", &lost), ("c", &lost)], &lost.1);
        kept(&[("a", &other), ("b", &lost), ("c", &other)], &other.1);
        assert_eq!(decide(&Found::new()), None);
    }
}
