//! A cache's home on S3.

pub mod survey;
