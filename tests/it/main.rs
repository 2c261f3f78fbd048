//! The program as a whole: the real binary over HTTP against an S3 server that verifies signatures.

mod aftermath;
mod behaviour;
mod company;
mod crashes;
mod credentials;
mod disk;
mod expired;
mod faults;
mod fidelity;
mod hostile;
mod inside;
mod program;
mod retries;
mod scripted;
mod secrets;
#[path = "../server/mod.rs"]
mod server;
mod several;
mod terminal;
mod tls;
#[cfg(all(target_os = "linux", target_env = "gnu"))]
mod traced;
