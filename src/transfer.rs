//! Moving one blob between a layout and a store.

pub mod buffers;
pub mod download;
pub mod hashing;
pub mod upload;
