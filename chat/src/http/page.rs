//! The page: plain files, built into the binary.

use actix_web::HttpResponse;
use actix_web::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, LOCATION, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
    X_FRAME_OPTIONS,
};

/// Scripts and styles from here only, connections to here only, and no frame around us.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
     base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

fn file(content_type: &str, body: &'static str) -> HttpResponse {
    HttpResponse::Ok()
        .content_type(content_type)
        .insert_header((CACHE_CONTROL, "no-cache"))
        .insert_header((CONTENT_SECURITY_POLICY, POLICY))
        .insert_header((X_CONTENT_TYPE_OPTIONS, "nosniff"))
        .insert_header((X_FRAME_OPTIONS, "DENY"))
        .insert_header((REFERRER_POLICY, "no-referrer"))
        .body(body)
}

/// `/`
pub async fn index() -> HttpResponse {
    file(
        "text/html; charset=utf-8",
        include_str!("../../web/index.html"),
    )
}

/// `/app.js`
pub async fn script() -> HttpResponse {
    file(
        "text/javascript; charset=utf-8",
        include_str!("../../web/app.js"),
    )
}

/// `/connection.js`
pub async fn connection() -> HttpResponse {
    file(
        "text/javascript; charset=utf-8",
        include_str!("../../web/connection.js"),
    )
}

/// `/style.css`
pub async fn style() -> HttpResponse {
    file(
        "text/css; charset=utf-8",
        include_str!("../../web/style.css"),
    )
}

/// `/favicon.svg`
pub async fn icon() -> HttpResponse {
    file("image/svg+xml", include_str!("../../web/favicon.svg"))
}

/// `/docs`, without the slash that the description of the API lives under.
pub async fn to_docs() -> HttpResponse {
    HttpResponse::Found()
        .insert_header((LOCATION, "/docs/"))
        .finish()
}
