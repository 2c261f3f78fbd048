//! The program as a whole: the real binary over HTTP against an S3 server that verifies signatures.

mod behaviour;
mod fidelity;
mod hostile;
mod program;
mod secrets;
#[path = "../server/mod.rs"]
mod server;
