//! The program as a whole: the real binary over HTTP against an S3 server that verifies signatures.

mod action;
mod aftermath;
mod behaviour;
mod claims;
mod company;
mod copy;
mod crashes;
mod credentials;
mod damaged;
mod disk;
mod docs;
mod doctor;
mod expired;
mod faults;
mod fidelity;
#[cfg(target_os = "linux")]
mod filesystems;
mod hammer;
mod hostile;
mod inside;
mod inspect;
mod inventory;
mod lifecycle;
mod limits;
mod ls;
mod manual;
mod mistakes;
mod output;
mod program;
mod prune;
mod races;
mod refresh;
mod retries;
#[path = "../scripted/mod.rs"]
mod scripted;
mod secrets;
mod serve;
#[path = "../server/mod.rs"]
mod server;
mod several;
mod story;
mod stuck;
mod sweep;
mod terminal;
mod tls;
#[cfg(all(target_os = "linux", target_env = "gnu"))]
mod traced;
mod verify;
