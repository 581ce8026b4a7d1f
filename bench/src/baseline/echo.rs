//! A WebSocket server with nothing in it, as the documentation of actix-ws shows it.

use actix_web::{App, HttpRequest, HttpResponse, HttpServer, rt, web};
use actix_ws::Message;

async fn echo(request: HttpRequest, body: web::Payload) -> actix_web::Result<HttpResponse> {
    let (response, mut session, mut stream) = actix_ws::handle(&request, body)?;
    rt::spawn(async move {
        while let Some(Ok(message)) = stream.recv().await {
            let sent = match message {
                Message::Text(text) => session.text(text).await,
                Message::Ping(bytes) => session.pong(&bytes).await,
                Message::Close(_) => return,
                Message::Binary(_) | Message::Continuation(_) | Message::Pong(_) | Message::Nop => {
                    Ok(())
                }
            };
            if sent.is_err() {
                return;
            }
        }
    });
    Ok(response)
}

/// Serves until the process ends.
pub async fn serve(listen: &str) -> anyhow::Result<()> {
    Ok(
        HttpServer::new(|| App::new().route("/v1/ws", web::get().to(echo)))
            .bind(listen)?
            .run()
            .await?,
    )
}
