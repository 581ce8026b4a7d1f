//! The command `chat-client talk`, through a connection that is cut again and again.

use super::{Options, Users};
use crate::service::{Service, locked};
use anyhow::{Context, ensure};
use chat_client::Api;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use testkit::proxy::{Mode, Proxy};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt};

pub(super) async fn talk(
    service: &mut Service,
    options: &Options,
    users: Users,
) -> anyhow::Result<()> {
    let (me, peer) = (users.user(0), users.user(1));
    let target = service.url(0).replace("http://", "");
    let proxy = Proxy::to(target).await;
    let token = service.access(0).token(me).await?;
    let mut child = tokio::process::Command::new(&options.chat_client)
        .args([
            "talk",
            "--user",
            &me.to_string(),
            "--with",
            &peer.to_string(),
        ])
        .args([
            "--url",
            &format!("http://127.0.0.1:{}", proxy.port),
            "--token",
            &token,
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .context("chat-client")?;
    let mut keyboard = child.stdin.take().context("stdin")?;
    let mut screen = tokio::io::BufReader::new(child.stdout.take().context("stdout")?).lines();
    let shown = Arc::new(Mutex::new(Vec::<String>::new()));
    let (shows, mut entered) = (shown.clone(), false);
    while !entered {
        let line = screen.next_line().await?.context("it ended")?;
        entered = line.contains("connected");
    }
    tokio::spawn(async move {
        while let Ok(Some(line)) = screen.next_line().await {
            locked(&shows).push(line);
        }
    });
    let end = Instant::now() + Duration::from_secs_f64(options.seconds.min(60.0));
    let other = Api::new(service.access(1), peer).await?;
    let mut rng = StdRng::seed_from_u64(options.seed);
    let (mut cuts, mut mine, mut theirs) = (0, 0u64, 0u64);
    let mut next_flap = Instant::now() + Duration::from_secs(1);
    let mut up = true;
    while Instant::now() < end {
        other
            .send(me, &format!("o{theirs}"), &format!("theirs {theirs}"))
            .await?;
        theirs += 1;
        if rng.random_range(0..3) == 0 {
            keyboard
                .write_all(format!("mine {mine}\n").as_bytes())
                .await?;
            mine += 1;
        }
        if Instant::now() > next_flap {
            up = !up;
            cuts += u64::from(!up);
            proxy.set(if up { Mode::Pass } else { Mode::Cut });
            let lasts = if up {
                500 + rng.random_range(0..3000)
            } else {
                50 + rng.random_range(0..700)
            };
            next_flap = Instant::now() + Duration::from_millis(lasts);
        }
        tokio::time::sleep(Duration::from_millis(40)).await;
    }
    proxy.set(Mode::Pass);
    let texts = || -> Vec<String> {
        let lines = locked(&shown);
        let of_dialog = lines
            .iter()
            .filter_map(|line| line.split_once(": ").map(|(_, text)| text.to_owned()));
        of_dialog
            .filter(|text| text.starts_with("mine ") || text.starts_with("theirs "))
            .collect()
    };
    let patience = Instant::now() + Duration::from_secs(20);
    while (texts().len() as u64) < mine + theirs {
        ensure!(
            Instant::now() < patience,
            "{} of {} are shown",
            texts().len(),
            mine + theirs
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let log: Vec<String> = other
        .log_upwards(me)
        .await?
        .into_iter()
        .map(|message| message.text)
        .collect();
    ensure!(texts() == log, "the screen does not show the log");
    drop(keyboard);
    ensure!(child.wait().await?.success(), "talk did not end well");
    println!(
        "  cut {cuts} times; {mine} lines of ours and {theirs} of the other: the screen is the log, line for line"
    );
    Ok(())
}
