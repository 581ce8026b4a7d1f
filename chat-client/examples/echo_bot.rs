//! A bot that answers every message with its text.
//!
//! ```text
//! cargo run -p chat -- serve --embedded
//! cargo run -p chat-client --example echo_bot -- http://127.0.0.1:8080 1000
//! ```

use chat_client::{Access, Client, Event, TokenSource};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(url), Some(bot)) = (arguments.next(), arguments.next()) else {
        return Err("usage: echo_bot URL USER".into());
    };
    let bot: u64 = bot.parse()?;
    let token = std::env::var("CHAT_TOKEN").map_or(TokenSource::Dev, TokenSource::Given);
    let (client, mut events) = Client::start(Access::new(&url, token), bot);
    while let Some(event) = events.recv().await {
        match event {
            Event::Message(message) if message.from != bot => {
                // The key is made from what is answered: if the bot starts again in the middle, no
                // answer is stored twice.
                let key = format!("echo.{}", message.seq);
                let client = client.clone();
                tokio::spawn(async move {
                    // In its dialog: that may be a room.
                    if let Err(e) = client.send(message.dialog, key, message.text).await {
                        eprintln!("not answered: {e}");
                    }
                });
            }
            Event::Closed(e) => return Err(e.into()),
            Event::Connected => eprintln!("user {bot} echoes"),
            Event::Disconnected { reason, .. } => eprintln!("disconnected: {reason}"),
            Event::Message(_)
            | Event::Entry(_)
            | Event::Read(_)
            | Event::Typing { .. }
            | Event::Presence(_)
            | Event::Resync(_) => {}
        }
    }
    Ok(())
}
