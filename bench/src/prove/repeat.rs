//! Every key is sent again through the other instance.

use super::Log;
use crate::service::{Service, locked};
use anyhow::{bail, ensure};
use chat_client::{Access, Api, ClientError};
use futures_util::{StreamExt, stream};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// The same key again, however often it has to be tried; the seq that is answered.
pub(super) async fn send_again(
    server: &Access,
    from: u64,
    to: u64,
    key: &str,
) -> anyhow::Result<u64> {
    let text = format!("text {}", key.trim_start_matches('k'));
    let patience = Instant::now() + Duration::from_secs(30);
    loop {
        let again = match Api::new(server.clone(), from).await {
            Ok(api) => api.send(to, key, &text).await,
            Err(e) => Err(e),
        };
        match again {
            Ok(again) => return Ok(again.seq),
            Err(ClientError::Refused(body)) if !body.retryable => bail!("{}", body.message),
            Err(e) => ensure!(Instant::now() < patience, "{e}"),
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Every key so far, through the instance that it was not sent to.
pub(super) async fn repeat_all(service: &Service, log: &Log, when: &str) -> anyhow::Result<()> {
    let sent = locked(&log.sent).clone();
    let servers = [service.access(0), service.access(1)];
    let count = sent.len();
    stream::iter(sent)
        .map(|one| {
            let other = servers[(one.from as usize) % 2].clone();
            async move {
                let again = send_again(&other, one.from, one.to, &one.key).await;
                log.again(&one.key, one.seq, again);
            }
        })
        .buffer_unordered(32)
        .collect::<()>()
        .await;
    let apart = log.apart.load(Ordering::Relaxed);
    let apart = if apart == 0 {
        "the same seqs".to_owned()
    } else {
        format!("the same seqs, but for {apart} so far that a lost shard alone had")
    };
    println!("          {count} keys repeated through the other instance {when}: {apart}");
    ensure!(locked(&log.wrong).is_empty(), "{:?}", locked(&log.wrong));
    Ok(())
}
