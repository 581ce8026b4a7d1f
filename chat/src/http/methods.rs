//! The methods of a route: HEAD where there is GET, and an answer with `Allow` for all others.

use super::HttpError;
use crate::error::ApiError;
use actix_web::http::header::ALLOW;
use actix_web::{FromRequest, Handler, HttpResponse, Resource, Responder, ResponseError, web};
use chat_wire::ErrorCode;

/// A route, and its methods so far.
pub struct Methods {
    resource: Resource,
    allowed: Vec<&'static str>,
}

/// A route without a method.
pub fn at(path: &str) -> Methods {
    Methods {
        resource: web::resource(path),
        allowed: Vec::new(),
    }
}

impl Methods {
    /// Answers GET and HEAD.
    pub fn get<F, Args>(mut self, handler: F) -> Self
    where
        F: Handler<Args>,
        Args: FromRequest + 'static,
        F::Output: Responder + 'static,
    {
        self.allowed.extend(["GET", "HEAD"]);
        self.resource = self
            .resource
            .route(web::get().to(handler.clone()))
            .route(web::head().to(handler));
        self
    }

    /// Answers POST.
    pub fn post<F, Args>(mut self, handler: F) -> Self
    where
        F: Handler<Args>,
        Args: FromRequest + 'static,
        F::Output: Responder + 'static,
    {
        self.allowed.push("POST");
        self.resource = self.resource.route(web::post().to(handler));
        self
    }

    /// Answers PUT.
    pub fn put<F, Args>(mut self, handler: F) -> Self
    where
        F: Handler<Args>,
        Args: FromRequest + 'static,
        F::Output: Responder + 'static,
    {
        self.allowed.push("PUT");
        self.resource = self.resource.route(web::put().to(handler));
        self
    }

    /// The resource, which refuses other methods.
    pub fn only(self) -> Resource {
        let allowed = self.allowed.join(", ");
        self.resource.default_service(web::to(move || {
            let message = format!("this route has {allowed}");
            let refusal = HttpError(ApiError::new(ErrorCode::MethodNotAllowed, message));
            let mut response: HttpResponse = refusal.error_response();
            if let Ok(methods) = allowed.parse() {
                response.headers_mut().insert(ALLOW, methods);
            }
            async move { response }
        }))
    }
}
