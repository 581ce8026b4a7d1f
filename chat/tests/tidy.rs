//! The house rules: who may import whom, what must be missing, and files that belong together.

#![allow(missing_docs, clippy::wildcard_enum_match_arm)]

use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_owned()
}

/// All Rust files of the server, with the module at the top that they belong to.
fn sources() -> Vec<(String, PathBuf, String)> {
    let files = sources_of("chat/src");
    assert!(files.len() > 20);
    files
}

fn sources_of(folder: &str) -> Vec<(String, PathBuf, String)> {
    let source = root().join(folder);
    let mut files = Vec::new();
    let mut folders = vec![source.clone()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let below = path.strip_prefix(&source).unwrap();
                let module = below
                    .components()
                    .next()
                    .unwrap()
                    .as_os_str()
                    .to_string_lossy()
                    .trim_end_matches(".rs")
                    .to_owned();
                let text = std::fs::read_to_string(&path).unwrap();
                // What a module's own tests use is their affair.
                let text = text.split("#[cfg(test)]").next().unwrap().to_owned();
                files.push((module, path, text));
            }
        }
    }
    files
}

/// The modules that a `lib.rs` or `mod.rs` declares, in its order.
fn order(declares: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(declares).unwrap();
    let lines = text.lines().filter_map(|line| {
        let line = line.strip_prefix("pub ").unwrap_or(line);
        line.strip_prefix("mod ")
    });
    lines
        .filter_map(|name| name.strip_suffix(';'))
        .map(str::to_owned)
        .collect()
}

/// The names that follow `prefix` in the code of a file.
fn names_after(text: &str, prefix: &str) -> Vec<String> {
    let lines = text.lines();
    let code = lines.filter(|line| !line.trim_start().starts_with("//"));
    let names = code.flat_map(|line| line.split(prefix).skip(1));
    let name = |rest: &str| {
        let letters = rest.chars();
        letters
            .take_while(|c| c.is_ascii_alphanumeric() || *c == '_')
            .collect()
    };
    names.map(name).collect()
}

#[test]
fn a_module_imports_only_modules_above_it() {
    for (folder, declares) in [
        ("chat/src", "lib.rs"),
        ("chat-client/src", "lib.rs"),
        ("testkit/src", "lib.rs"),
        ("bench/src", "main.rs"),
    ] {
        let order = order(&root().join(folder).join(declares));
        let place = |name: &str| order.iter().position(|module| module == name);
        for (module, path, text) in sources_of(folder) {
            // lib.rs itself is above all modules, and the files of a program may use all of the
            // library.
            let Some(own) = place(&module) else { continue };
            for name in names_after(&text, "crate::") {
                assert!(
                    place(&name).is_none_or(|other| other <= own),
                    "{}: {module} imports {name}, which is declared below it",
                    path.display()
                );
            }
        }
    }
    // Only these are not in lib.rs.
    let order = order(&root().join("chat/src/lib.rs"));
    for (module, ..) in sources() {
        assert!(
            order.contains(&module)
                || ["lib", "main", "cli", "embedded"].contains(&module.as_str()),
            "{module}"
        );
    }
}

/// Inside a folder too: each file imports only files above it in `mod.rs`.
#[test]
fn a_file_imports_only_files_of_its_folder_above_it() {
    let mut folders = 0;
    for (_, path, _) in sources() {
        if !path.ends_with("mod.rs") {
            continue;
        }
        let folder = path.parent().unwrap();
        let order = order(&path);
        let name = folder.file_name().unwrap().to_str().unwrap();
        folders += 1;
        for (own, file) in order.iter().enumerate() {
            let file = folder.join(format!("{file}.rs"));
            let Ok(text) = std::fs::read_to_string(&file) else {
                continue; // a folder
            };
            let text = text.split("#[cfg(test)]").next().unwrap();
            let mut used = names_after(text, "use super::");
            used.extend(names_after(text, &format!("crate::{name}::")));
            for used in used {
                let other = order.iter().position(|file| *file == used);
                assert!(
                    other.is_none_or(|other| other < own),
                    "{}: imports {used}, which is declared below it",
                    file.display()
                );
            }
        }
    }
    assert!(folders > 8);
}

#[test]
fn each_foreign_thing_stays_in_its_own_room() {
    for (what, rooms) in [
        ("actix", ["http", "server", "main"].as_slice()),
        ("mysql_async", &["store"]),
        ("rusqlite", &["store"]),
        ("refinery", &["store"]),
        ("async_nats", &["bus"]),
        ("jsonwebtoken", &["http"]),
        ("hashring", &["domain"]),
    ] {
        for (module, path, text) in sources() {
            let code: String = text
                .lines()
                .filter(|line| !line.trim_start().starts_with("//"))
                .collect();
            let named = [
                format!("{what}::"),
                format!("{what}_web"),
                format!("{what}_ws"),
                format!("{what}_http"),
            ];
            let uses = named.iter().any(|name| code.contains(name.as_str()));
            assert!(
                !uses || rooms.contains(&module.as_str()),
                "{}: {what} belongs into {rooms:?}",
                path.display()
            );
        }
    }
}

#[test]
fn the_domain_has_no_async_no_clock_no_randomness_and_no_file() {
    for (module, path, text) in sources() {
        let pure_files = [
            "store/batch_plan.rs",
            "bus/event.rs",
            "delivery/sequencer.rs",
        ];
        if module == "domain" || pure_files.iter().any(|file| path.ends_with(file)) {
            for word in [
                "async ",
                ".await",
                "tokio",
                "Instant::",
                "SystemTime",
                "rand::",
                "std::fs",
                "std::env",
                "thread::",
            ] {
                assert!(!text.contains(word), "{}: {word}", path.display());
            }
        }
    }
}

#[test]
fn both_dialects_have_the_same_migrations() {
    let names = |dialect: &str| {
        let folder = root().join("migrations").join(dialect);
        let mut names: Vec<String> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    assert_eq!(names("mysql"), names("sqlite"));
    assert!(!names("mysql").is_empty());
}

#[test]
fn nothing_is_left_behind() {
    for (_, path, text) in sources() {
        for mark in ["TODO", "FIXME", "XXX", "dbg!(", "todo!(", "unimplemented!("] {
            assert!(!text.contains(mark), "{}: {mark}", path.display());
        }
        for (number, line) in text.lines().enumerate() {
            let reason = |at: usize| {
                text.lines()
                    .nth(at)
                    .is_some_and(|line| line.contains("// unwrap:"))
            };
            assert!(
                !line.contains(".unwrap()") || reason(number) || reason(number.wrapping_sub(1)),
                "{}:{}: unwrap without its reason",
                path.display(),
                number + 1
            );
        }
    }
}

/// The README says where each thing is done; every place it names must be there.
#[test]
fn the_readme_names_places_that_exist() {
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let table = readme
        .split("## Where is")
        .nth(1)
        .expect("a section Where is …");
    let mut places = 0;
    for row in table.lines().filter(|line| line.starts_with('|')) {
        for place in row
            .split('`')
            .skip(1)
            .step_by(2)
            .filter(|place| place.contains('/'))
        {
            assert!(root().join(place).exists(), "README: {place}");
            places += 1;
        }
    }
    assert!(places > 10);
}

#[test]
fn compose_gives_the_services_what_they_need() {
    let compose = std::fs::read_to_string(root().join("docker-compose.yml")).unwrap();
    let shards = std::fs::read_to_string(root().join("shards.toml")).unwrap();
    for n in 1..=4 {
        assert!(
            compose.contains(&format!("shard{n}:")) && shards.contains(&format!("@shard{n}:3306/")),
            "shard{n}"
        );
    }
    for (service, needs) in [
        ("chat1:", "CHAT__AUTH__SECRET"),
        ("nats:", "image: nats:2"),
        ("8086", "127.0.0.1"),
    ] {
        assert!(
            compose.contains(service) && compose.contains(needs),
            "{service} {needs}"
        );
    }
    // A file that is mounted by itself goes stale at the first rename-on-save: the folder is
    // mounted.
    assert!(
        !compose.contains("shards.toml:/"),
        "mount the folder of shards.toml, not the file"
    );
    let dockerfile = std::fs::read_to_string(root().join("Dockerfile")).unwrap();
    assert!(!dockerfile.contains("# syntax="));
}

/// One width for code and comments; rustfmt does not wrap comments.
#[test]
fn comments_are_as_wide_as_code() {
    for folder in [
        "chat/src",
        "chat/wire/src",
        "chat/tests",
        "chat-client/src",
        "testkit/src",
        "bench/src",
    ] {
        for (_, path, _) in sources_of(folder) {
            let text = std::fs::read_to_string(&path).unwrap();
            for (number, line) in text.lines().enumerate() {
                let is_comment = line.trim_start().starts_with("//");
                assert!(
                    !is_comment || line.chars().count() <= 100,
                    "{}:{}",
                    path.display(),
                    number + 1
                );
            }
        }
    }
}
