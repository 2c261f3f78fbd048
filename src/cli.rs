//! The command line: what was typed, and what it means once every value has been checked.

pub mod args;
pub mod manual;
pub mod spec;
