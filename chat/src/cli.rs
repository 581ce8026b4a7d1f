//! What an operator asks on the command line: `chat plan`, `chat status`, `chat pause`, `chat
//! resume`, `chat where`.

use anyhow::{Context, bail};
use chat::cluster::{Cluster, IfEmpty, stores};
use chat::config::{Secret, Settings};
use chat::domain::dialog::{DialogId, UserId};
use chat::domain::ownership::SlotRow;
use chat::domain::shards_file::StoreUrl;
use chat::domain::slot::{SLOTS, Slot};
use chat::metrics::Metrics;
use chat::resharding::Report;
use chat::resharding::estimate::{Plan, plan as work_out};
use chat::server::read_shards_file;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::io::{ErrorKind, IsTerminal, Write as _};
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

async fn look(settings: &Settings) -> anyhow::Result<Cluster> {
    let (parsed, _) = read_shards_file(&settings.shards_file)?;
    let runtime = tokio::runtime::Handle::current();
    let cluster = Cluster::start(
        &parsed,
        stores(&settings.store, &runtime),
        &settings.store,
        IfEmpty::Fail,
        &runtime,
        &Metrics::new(),
    )
    .await?;
    Ok(cluster)
}

/// Prints the slot, owner and target of a dialog, and the rows of its slot.
pub async fn find(settings: &Settings, dialog: DialogId, json: bool) -> anyhow::Result<()> {
    let cluster = look(settings).await?;
    let slot = Slot::of(dialog);
    let view = cluster.view();
    let owner = cluster.known_owner(slot);
    let mut rows = Vec::new();
    for shard in &view.shards {
        let ask = shard
            .ask(
                move |store, identity| async move { store.rows(&identity, None, Some(slot)).await },
            )
            .await;
        let row = ask.ok().and_then(|rows| rows.into_iter().next());
        rows.extend(row.map(|row| (shard.name(), row)));
    }
    if json {
        let row = |(shard, row): &(&str, SlotRow)| {
            json!({
                "shard": shard,
                "state": row.state.to_string(),
                "term": row.term,
                "peer": row.peer,
                "history": row.history.to_string(),
            })
        };
        let place = json!({
            "dialog": dialog.to_string(),
            "slot": slot.get(),
            "slots": SLOTS,
            "owner": owner.map(|shard| shard.name().to_owned()),
            "target": view.target(slot),
            "rows": rows.iter().map(row).collect::<Vec<_>>(),
        });
        return print(&format!("{place}\n"));
    }
    let owner = owner.map_or(
        "unknown: no shard that answers owns it".to_owned(),
        |shard| shard.name().to_owned(),
    );
    print(&format!(
        "dialog {dialog}\nslot   {slot} of {SLOTS}\nowner  {owner}\ntarget {}\n",
        view.target(slot)
    ))?;
    for (name, row) in rows {
        let peer = row
            .peer
            .as_ref()
            .map_or(String::new(), |peer| format!(", with {peer}"));
        let gap = if row.history.is_complete() {
            String::new()
        } else {
            format!(", {}", row.history)
        };
        print(&format!(
            "       {name:<12} {} (term {}{peer}{gap})\n",
            row.state, row.term
        ))?;
    }
    Ok(())
}

/// What a file would do.
pub async fn plan(settings: &Settings, file: &Path, json: bool) -> anyhow::Result<()> {
    let cluster = look(settings).await?;
    let (parsed, _) = read_shards_file(file)?;
    let found = work_out(&cluster, &parsed)
        .await
        .map_err(|what| anyhow::anyhow!("{}: {what}", file.display()))?;
    // Opening a SQLite shard makes its file; one that is missing is the empty database that a new
    // shard needs.
    let mut there = parsed.clone();
    there.shards.retain(|_, shard| match &shard.url {
        StoreUrl::Sqlite(path) => Path::new(path).exists(),
        StoreUrl::Mysql(_) => true,
    });
    cluster.open(&there).await?;
    for name in parsed
        .shards
        .keys()
        .filter(|name| !cluster.view().topology.shards.contains_key(*name))
    {
        if let Some(shard) = cluster.opened_shard(name) {
            let there = shard
                .ask(|store, _| async move { store.meta().await })
                .await;
            match there.with_context(|| {
                format!("{}: the new shard {name} cannot be used", file.display())
            })? {
                Some(meta) if meta.cluster_id != cluster.id() || meta.shard_name != *name => {
                    bail!(
                        "{}: the url of {name} leads to a database of {}; a new shard needs an empty one",
                        file.display(),
                        meta.shard_name
                    )
                }
                Some(_) | None => {}
            }
        }
    }
    if json {
        return print(&format!("{}\n", serde_json::to_string(&found)?));
    }
    print(&describe(&found))
}

fn describe(plan: &Plan) -> String {
    let mut out = String::new();
    let Some(difference) = &plan.difference else {
        return "nothing would change\n".into();
    };
    let _ = writeln!(out, "the edit: {difference}");
    let mut total = 0;
    for (from, to, amount) in &plan.moves {
        total += amount.slots;
        let _ = writeln!(
            out,
            "  {from:>12} -> {to:<12} {:>5} slots {:>9} dialogs {:>11} messages {:>9}",
            amount.slots,
            amount.dialogs,
            amount.messages,
            indicatif::HumanBytes(amount.bytes).to_string()
        );
    }
    let _ = writeln!(
        out,
        "{total} of {SLOTS} slots move ({:.1} %), about {}",
        100.0 * total as f64 / SLOTS as f64,
        indicatif::HumanDuration(Duration::from_secs_f64(plan.seconds))
    );
    if plan.claimed > 0 {
        let _ = writeln!(
            out,
            "{} slots would be claimed by other shards, without the history that only a shard that is down has",
            plan.claimed
        );
    }
    let _ = writeln!(out, "messages by shard, before and after:");
    for (name, (before, after)) in &plan.shares {
        let _ = writeln!(out, "  {name:>12} {before:>11} {after:>11}");
    }
    for name in &plan.silent {
        let _ = writeln!(out, "{name} does not answer: its rows are not counted");
    }
    out
}

/// The shards and the progress of resharding, as a running instance reports them.
pub async fn status(
    admin: SocketAddr,
    token: Option<&Secret>,
    watch: bool,
    json: bool,
) -> anyhow::Result<()> {
    loop {
        let change = ask(admin, token, "GET", "/admin/resharding", "").await?;
        let topology = ask(admin, token, "GET", "/admin/topology", "").await?;
        let shards = ask(admin, token, "GET", "/admin/slots", "").await?;
        let text = if json {
            let all =
                json!({"resharding": change, "topology": topology, "shards": shards["shards"]});
            format!("{all}\n")
        } else {
            table(&change, &topology, &shards)
        };
        if watch && !json && std::io::stdout().is_terminal() {
            // Home, text, and whatever was below it before is cleared.
            print(&format!("\x1b[H{}\x1b[J", text.replace('\n', "\x1b[K\n")))?;
        } else {
            print(&text)?;
        }
        if !watch {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// Pauses or resumes rebalancing.
pub async fn pause(admin: SocketAddr, token: Option<&Secret>, pause: bool) -> anyhow::Result<()> {
    let (path, now) = if pause {
        (
            "/admin/resharding/pause",
            "rebalancing paused; chat resume continues it",
        )
    } else {
        ("/admin/resharding/resume", "rebalancing resumed")
    };
    ask(admin, token, "POST", path, "").await?;
    print(&format!("{now}\n"))?;
    Ok(())
}

/// Ends the sessions of a user.
pub async fn disconnect(
    admin: SocketAddr,
    token: Option<&Secret>,
    user: UserId,
) -> anyhow::Result<()> {
    let path = format!("/admin/users/{user}/disconnect");
    ask(admin, token, "POST", &path, "").await?;
    print(&format!("the sessions of user {user} end\n"))
}

/// Refuses earlier tokens of a user.
pub async fn revoke(
    admin: SocketAddr,
    token: Option<&Secret>,
    user: UserId,
    issued_before: Option<u64>,
) -> anyhow::Result<()> {
    let path = format!("/admin/users/{user}/revoke");
    let body = issued_before.map_or(String::new(), |time| {
        format!("{{\"issued_before\":{time}}}")
    });
    let answer = ask(admin, token, "POST", &path, &body).await?;
    let missing: Vec<&str> = answer["not_yet_on"]
        .as_array()
        .into_iter()
        .flatten()
        .map(text)
        .collect();
    let later = match &missing[..] {
        [] => String::new(),
        names => format!("; {} does not answer and gets it later", names.join(", ")),
    };
    print(&format!(
        "tokens of user {user} that were issued before {} are refused{later}\n",
        answer["issued_before"]
    ))
}

/// What `chat status` prints.
fn table(change: &Value, topology: &Value, shards: &Value) -> String {
    let mut out = summary(change);
    let _ = writeln!(
        out,
        "\n{:>12} {:>9} {:>6} {:>6} {:>7} {:>7} {:>8} {:>7}  share",
        "shard", "state", "weight", "owner", "sealed", "coming", "fenced", "to purge"
    );
    for shard in shards["shards"].as_array().unwrap_or(&Vec::new()) {
        let entry = &topology["topology"]["shards"][text(&shard["name"])];
        let _ = writeln!(out, "{}", shard_line(shard, entry));
    }
    let report: Option<Report> = serde_json::from_value(change["work"].clone()).ok();
    match report {
        Some(report) => out + &work(&report, text(&change["coordinator"])),
        None => out + "\nno instance coordinates\n",
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// The topology in effect, the state of the file, and the instances.
fn summary(change: &Value) -> String {
    let file = &change["file"];
    let others: Vec<String> = change["others"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(name, version)| format!("{name} has {version}"))
        .collect();
    format!(
        "topology  version {} {}\nfile      {} {}\ninstance  {}; others: {}\n",
        change["version"],
        text(&change["phase"]),
        text(&file["state"]).replace('_', " "),
        text(&file["reason"]),
        text(&change["instance"]),
        if others.is_empty() {
            "none".into()
        } else {
            others.join(", ")
        }
    )
}

/// The slots of a shard by state, and its share of all slots.
fn shard_line(shard: &Value, entry: &Value) -> String {
    let (name, state, weight) = (
        text(&shard["name"]),
        text(&entry["state"]),
        &entry["weight"],
    );
    if let Some(reason) = shard["reason"].as_str() {
        return format!("{name:>12} {state:>9} {weight:>6} does not answer: {reason}");
    }
    let number = |field: &str| shard[field].as_u64().unwrap_or(0);
    let share = number("owner") as f64 / SLOTS as f64;
    format!(
        "{name:>12} {state:>9} {weight:>6} {:>6} {:>7} {:>7} {:>8} {:>7}  {:<25} {:.1} %",
        number("owner"),
        number("sealed"),
        number("incoming"),
        number("fenced"),
        number("to_purge"),
        "█".repeat((share * 25.0).round() as usize),
        share * 100.0
    )
}

/// The work of the coordinator: its stage, and the progress of moves and merges.
fn work(report: &Report, coordinator: &str) -> String {
    let reason = report.blocked_by.as_ref();
    let reason = reason.map_or(String::new(), |reason| format!(": {reason}"));
    let mut out = format!("\n{}{reason} (by {coordinator})\n", report.stage);
    let all = report.slots_moved + report.slots_left;
    if all > 0 {
        let done = report.slots_moved as f64 / all as f64;
        let bar = "#".repeat((done * 40.0) as usize);
        let left = match report.seconds_left {
            Some(left) => format!(
                "{} left",
                indicatif::HumanDuration(Duration::from_secs_f64(left))
            ),
            None if report.slots_left == 0 => "done".to_owned(),
            None => "time left unknown".to_owned(),
        };
        let _ = writeln!(
            out,
            "[{bar:.<40}] {} of {all} slots, {:.0} slots/s, {} messages copied, {:.0}/s, {left}",
            report.slots_moved,
            report.slots_per_second,
            report.messages_copied,
            report.messages_per_second
        );
        for (pair, left) in report.left_by_pair.iter().filter(|(_, left)| **left > 0) {
            let _ = writeln!(out, "  {pair}: {left} slots left");
        }
        let freeze = report.freeze_ms;
        let _ = writeln!(
            out,
            "slots took no writes for: p50 {:.1} ms, p99 {:.1} ms, longest {:.1} ms",
            freeze.p50, freeze.p99, freeze.max
        );
    }
    if report.slots_merged + report.slots_to_merge > 0 {
        let _ = writeln!(
            out,
            "{} slots merged back, {} to go",
            report.slots_merged, report.slots_to_merge
        );
    }
    if report.attempts_failed > 0 {
        let _ = writeln!(
            out,
            "{} attempts were cancelled and made again",
            report.attempts_failed
        );
    }
    out
}

/// One request to the admin listener, which speaks plain HTTP.
async fn ask(
    admin: SocketAddr,
    token: Option<&Secret>,
    method: &str,
    path: &str,
    body: &str,
) -> anyhow::Result<Value> {
    let place = || format!("the admin listener at {admin}");
    let mut stream = TcpStream::connect(admin).await.with_context(place)?;
    let bearer = token.map_or(String::new(), |token| {
        format!("Authorization: Bearer {}\r\n", token.expose())
    });
    let request = format!(
        "{method} {path} HTTP/1.0\r\nHost: {admin}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n{bearer}\r\n{body}",
        body.len()
    );
    stream
        .write_all(request.as_bytes())
        .await
        .with_context(place)?;
    let mut answer = String::new();
    stream
        .read_to_string(&mut answer)
        .await
        .with_context(place)?;
    let (head, body) = answer.split_once("\r\n\r\n").with_context(place)?;
    let body: Value = serde_json::from_str(body).with_context(place)?;
    if !head.lines().next().unwrap_or_default().contains(" 200") {
        bail!(
            "{}: {}",
            place(),
            body["message"].as_str().unwrap_or("refused")
        );
    }
    Ok(body)
}

/// Prints a text. A closed pipe, as of `| head`, ends the command: the reader has all that it
/// wants.
///
/// # Errors
/// Any other failure to write.
pub fn print(text: &str) -> anyhow::Result<()> {
    let mut output = std::io::stdout().lock();
    let written = output.write_all(text.as_bytes());
    match written.and_then(|()| output.flush()) {
        Err(e) if e.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        written => Ok(written?),
    }
}
