//! The program as a whole: the real binary over HTTP against an S3 server that verifies signatures.

mod behaviour;
mod expired;
mod faults;
mod fidelity;
mod inside;
mod program;
mod retries;
#[path = "../server/mod.rs"]
mod server;
