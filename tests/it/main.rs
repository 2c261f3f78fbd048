//! The program as a whole: the real binary over HTTP against an S3 server that verifies signatures.

mod behaviour;
mod credentials;
mod fidelity;
mod program;
mod scripted;
#[path = "../server/mod.rs"]
mod server;
mod tls;
