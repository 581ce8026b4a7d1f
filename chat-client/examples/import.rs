//! Sends the lines of a file (`from<TAB>to<TAB>text`), each once: run again after an interruption,
//! it continues.
//!
//! ```text
//! printf '7\t42\thello\n42\t7\thi\n' > lines.tsv
//! cargo run -p chat-client --example import -- http://127.0.0.1:8080 lines.tsv
//! ```

use chat_client::{Access, Api, ClientError, TokenSource};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::time::Duration;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(url), Some(file)) = (arguments.next(), arguments.next()) else {
        return Err("usage: import URL FILE".into());
    };
    let secret = std::env::var("CHAT_SECRET").map_or(TokenSource::Dev, TokenSource::Secret);
    let access = Access::new(&url, secret);
    let mut users = HashMap::<u64, Api>::new();
    for (number, line) in (1..).zip(std::fs::read_to_string(&file)?.lines()) {
        let mut fields = line.splitn(3, '\t');
        let (Some(from), Some(to), Some(text)) = (fields.next(), fields.next(), fields.next())
        else {
            return Err(format!("{file}:{number}: three fields are expected").into());
        };
        let (from, to): (u64, u64) = (from.parse()?, to.parse()?);
        let api = match users.entry(from) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => new.insert(Api::new(access.clone(), from).await?),
        };
        // The key names the line: a line that was stored before is not stored again.
        let key = format!("import.{number}");
        loop {
            match api.send(to, &key, text).await {
                Ok(_) => break,
                Err(ClientError::Refused(body)) if body.retryable => {
                    let wait = body.retry_after_ms.unwrap_or(200);
                    tokio::time::sleep(Duration::from_millis(wait)).await;
                }
                Err(e) => return Err(format!("{file}:{number}: {e}").into()),
            }
        }
    }
    Ok(())
}
