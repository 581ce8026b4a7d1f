//! Read marks and inboxes, while a shard is added.

use super::{MarksOf, Options, Users};
use crate::devices::{Device, all_connected};
use crate::service::Service;
use anyhow::{Context, ensure};
use chat_client::Api;
use chat_wire::Message;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::collections::BTreeMap;
use std::time::Duration;

pub(super) async fn marks(
    service: &mut Service,
    options: &Options,
    users: Users,
) -> anyhow::Result<()> {
    let events = options.count.unwrap_or(10_000);
    let users = Users { count: 20, ..users };
    let mut rng = StdRng::seed_from_u64(users.seed);
    let pairs = users.pairs(60);
    let mut devices = Vec::new();
    for n in 0..users.count {
        for i in 0..2 {
            devices.push(Device::start(service.access_to_any(i), users.user(n)));
        }
    }
    all_connected(&devices).await?;
    let (mut traffic, mut read): (BTreeMap<String, Vec<Message>>, MarksOf) = Default::default();
    let (mut sends, mut marked, mut reconnections, mut reads) = (0u64, 0u64, 0u64, 0u64);
    for n in 0..events {
        if n == events / 2 {
            println!("  shard5 is added");
            service.save(&[(1, ""), (2, ""), (3, ""), (4, ""), (5, "")])?;
        }
        let (a, b) = pairs[rng.random_range(0..pairs.len() as u64) as usize];
        let (me, other) = if rng.random_range(0..2) == 0 {
            (a, b)
        } else {
            (b, a)
        };
        let dialog = format!("{a}_{b}");
        let place = ((me - users.first) * 2 + rng.random_range(0..2)) as usize;
        match rng.random_range(0..100) {
            0..60 => {
                let (key, text) = (format!("m{n}"), format!("message {n}"));
                let sent = devices[place]
                    .client
                    .send(other, key.clone(), text.clone())
                    .await?;
                traffic.entry(dialog.clone()).or_default().push(Message {
                    dialog,
                    seq: sent.seq,
                    from: me,
                    to: Some(other),
                    text,
                    at: sent.at,
                    key: Some(key),
                    ..Message::default()
                });
                sends += 1;
            }
            60..95 => {
                // Through REST the answer says where the mark is now; through the socket everyone
                // receives it.
                let length = traffic.get(&dialog).map_or(0, Vec::len) as u64;
                if length == 0 {
                    continue;
                }
                // What goes through a socket is on its way for a while: beyond the end might not be
                // beyond it any more.
                let asks = rng.random_range(0..2) == 0;
                let seq = 1 + rng.random_range(0..if asks { length + 3 } else { length });
                let known = read.entry((me, dialog.clone())).or_default();
                *known = (*known).max(seq.min(length));
                if asks {
                    let mark = Api::new(service.access((n % 2) as u16), me)
                        .await?
                        .mark_read(other, seq)
                        .await?;
                    ensure!(
                        mark.seq >= seq.min(length) && mark.seq <= *known,
                        "{dialog}: read up to {}, and it should be {known}",
                        mark.seq
                    );
                    reads += 1;
                } else {
                    devices[place].client.mark_read(other, seq).await?;
                }
                marked += 1;
            }
            95..99 => {
                devices[place] = Device::start(service.access_to_any((n % 2) as u16), me);
                reconnections += 1;
            }
            _ => {
                // What is expected at the end must be right at any moment, too. Marks through
                // sockets are still on their way: those only lag.
                let inbox = Api::new(service.access((n % 2) as u16), me)
                    .await?
                    .inbox(100, None)
                    .await?;
                for entry in &inbox.dialogs {
                    let of_model = read.get(&(me, entry.dialog.clone())).copied().unwrap_or(0);
                    ensure!(
                        entry.read <= of_model,
                        "{}: read {} of {of_model}",
                        entry.dialog,
                        entry.read
                    );
                    let log = &traffic[&entry.dialog];
                    let unread = log
                        .iter()
                        .filter(|message| message.from != me && message.seq > entry.read)
                        .count();
                    ensure!(
                        entry.unread as usize == unread.min(100),
                        "{}: unread {} instead of {unread}",
                        entry.dialog,
                        entry.unread
                    );
                }
            }
        }
    }
    let mut none = Vec::new();
    service.carried_out(2, &mut none).await?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut entries = 0;
    for n in 0..users.count {
        let me = users.user(n);
        for i in 0..2 {
            let inbox = Api::new(service.access(i), me)
                .await?
                .inbox(100, None)
                .await?;
            let mut expected: Vec<&Vec<Message>> = traffic
                .iter()
                .filter(|(dialog, _)| dialog.split('_').any(|member| member == me.to_string()))
                .map(|(_, log)| log)
                .collect();
            expected.sort_by(|a, b| b.last().map(|m| &m.at).cmp(&a.last().map(|m| &m.at)));
            ensure!(
                inbox.dialogs.len() == expected.len(),
                "{} dialogs instead of {}",
                inbox.dialogs.len(),
                expected.len()
            );
            for (entry, log) in inbox.dialogs.iter().zip(expected) {
                let last = log.last().context("an empty log")?;
                let read = read.get(&(me, entry.dialog.clone())).copied().unwrap_or(0);
                let unread = log
                    .iter()
                    .filter(|message| message.from != me && message.seq > read)
                    .count()
                    .min(100);
                ensure!(
                    entry.last == *last && entry.read == read && entry.unread as usize == unread,
                    "the inbox of {me} through instance {i}: {entry:?}, and it should be read {read}, unread {unread}, last {last:?}"
                );
                entries += 1;
            }
        }
    }
    println!(
        "  {events} events: {sends} sends, {marked} read marks ({reads} with an answer that was compared), {reconnections} reconnections, a shard added"
    );
    println!(
        "  {entries} entries of inboxes through both instances are what the logs say: order, last message, read, unread"
    );
    Ok(())
}
