//! Owns the paths of the Open Inference Protocol v2 and their handlers.
//!
//! ```text
//!   GET  /v2/health/live                  the process is there
//!   GET  /v2/health/ready                 the model is loaded
//!   GET  /v2                              this server
//!   GET  /v2/models/NAME                  inputs and outputs; waits until the model is loaded
//!   GET  /v2/models/NAME/ready            as health/ready
//!   POST /v2/models/NAME/infer            a run; waits too
//! ```
//! `NAME` may be followed by `/versions/1`.

use hyper::{Method, Request, Response, StatusCode, body::Incoming};
use proto_msgs::{ErrorCode, Failure};

use super::{
    oip::{ModelMetadata, ServerMetadata},
    request, response,
    response::Pieces,
};
use crate::model_thread::{Loaded, ModelThread};

/// Answers the requests for one model.
#[derive(Debug)]
pub(super) struct Service {
    /// The model.
    pub(super) model: ModelThread,
    /// The model's name in paths.
    pub(super) name: String,
    /// Longest request in bytes.
    pub(super) body_bytes_max: u64,
}

impl Service {
    /// Answers one request.
    pub(super) async fn answer(&self, request: Request<Incoming>) -> Response<Pieces> {
        let answer = self.route(request).await;
        answer.unwrap_or_else(|failure| {
            tracing::debug!(code = %failure.code, text = failure.text, "refused");
            response::failure(&failure)
        })
    }

    async fn route(&self, request: Request<Incoming>) -> Result<Response<Pieces>, Failure> {
        let path = request.uri().path().to_owned();
        let parts: Vec<_> = path.trim_matches('/').split('/').collect();
        let model = match parts[..] {
            ["v2", "models", name, "versions", "1", ref rest @ ..] => Some((name, rest)),
            ["v2", "models", name, ref rest @ ..] => Some((name, rest)),
            _ => None,
        };
        match (request.method(), &parts[..], model) {
            (&Method::GET, ["v2"], _) => Ok(response::json(StatusCode::OK, &SERVER)),
            (&Method::GET, ["v2", "health", "live"], _) => Ok(response::empty(StatusCode::OK)),
            (&Method::GET, ["v2", "health", "ready"], _) => self.ready(),
            (_, _, Some((name, _))) if name != self.name => Err(not_found(format!("there is no model '{name}'"))),
            (&Method::GET, _, Some((_, []))) => Ok(self.metadata(&*self.model.loaded().await?)),
            (&Method::GET, _, Some((_, ["ready"]))) => self.ready(),
            (&Method::POST, _, Some((_, ["infer"]))) => self.infer(request).await,
            (method, _, _) => Err(not_found(format!("there is no {method} {path}"))),
        }
    }

    fn ready(&self) -> Result<Response<Pieces>, Failure> {
        match self.model.state() {
            Some(Ok(_)) => Ok(response::empty(StatusCode::OK)),
            Some(Err(failure)) => Err(failure),
            None => Err(Failure::new(ErrorCode::Busy, "the model is being loaded")),
        }
    }

    fn metadata(&self, loaded: &Loaded) -> Response<Pieces> {
        response::json(StatusCode::OK, &ModelMetadata::of(&self.name, &loaded.signature))
    }

    async fn infer(&self, request: Request<Incoming>) -> Result<Response<Pieces>, Failure> {
        let loaded = self.model.loaded().await?;
        let (head, body) = request.into_parts();
        let order = request::read(&head.headers, body, &loaded.signature, self.body_bytes_max).await?;
        let ran = self.model.run(order.inputs, order.sequence).await?;
        response::inference(&self.name, &loaded.signature, order.id, &order.outputs, &ran)
    }
}

const SERVER: ServerMetadata = ServerMetadata {
    name: "mesh-runner",
    version: env!("CARGO_PKG_VERSION"),
    extensions: ["binary_tensor_data", "sequence"],
};

fn not_found(text: String) -> Failure {
    Failure::new(ErrorCode::NotFound, text)
}
