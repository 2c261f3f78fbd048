//! Moving one blob: up, down, or refreshed in place. Knows neither layouts nor buckets.

pub mod arriving;
pub mod body;
pub mod buffers;
mod copy;
pub mod download;
pub mod forward;
pub mod hashing;
pub mod limits;
mod multipart;
pub mod object;
mod pace;
mod piece;
pub mod refresh;
mod unfinished;
pub mod upload;
