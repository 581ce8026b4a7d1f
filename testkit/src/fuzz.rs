//! Random inputs: what is valid, and what is nearly so.

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};

/// How many inputs a fuzz test tries: `CHAT_FUZZ`, or else `few`.
pub fn executions(few: u64) -> u64 {
    let given = std::env::var("CHAT_FUZZ").ok();
    given.map_or(few, |number| number.parse().expect("CHAT_FUZZ is a number"))
}

/// Calls `check` with a source of randomness, once for each input. The seed of the first is
/// printed, and `CHAT_SEED` repeats it.
pub fn each(few: u64, mut check: impl FnMut(&mut StdRng)) {
    let (seed, executions) = (crate::seed(), executions(few));
    for n in 0..executions {
        check(&mut StdRng::seed_from_u64(seed.wrapping_add(n)));
    }
    println!("{executions} executions");
}

/// A text of the corpus with some bytes changed, repeated, taken out or put in; sometimes none.
pub fn mutated(rng: &mut StdRng, corpus: &[&str]) -> Vec<u8> {
    const INTERESTING: [&str; 16] = [
        "0",
        "-1",
        "18446744073709551615",
        "9007199254740992",
        "1e999",
        "null",
        "\"",
        "{",
        "}",
        "[",
        "\\u0000",
        "\\ud800",
        "\n",
        " ",
        "_",
        "é😀",
    ];
    let mut text = corpus.choose(rng).unwrap().as_bytes().to_vec();
    for _ in 0..rng.random_range(0..6) {
        let at = rng.random_range(0..=text.len());
        match rng.random_range(0..6) {
            0 => text.insert(at, rng.random()),
            1 if at < text.len() => text[at] = rng.random(),
            2 if at < text.len() => drop(text.remove(at)),
            3 => {
                let part = INTERESTING.choose(rng).unwrap().as_bytes();
                text.splice(at..at, part.iter().copied());
            }
            4 => {
                let end = rng.random_range(at..=text.len()).min(at + 20);
                let part = text[at..end].to_vec();
                text.splice(at..at, part);
            }
            _ => {
                let end = rng.random_range(at..=text.len()).min(at + 10);
                text.drain(at..end);
            }
        }
    }
    text
}
