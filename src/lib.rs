//! layercache moves BuildKit's build cache between a local OCI layout and S3, without a build.
pub mod args;
pub mod cache_config;
pub mod config;
pub mod diff_id;
pub mod digest;
pub mod layout;
pub mod oci;
pub mod progress;
pub mod report;
pub mod retry;
pub mod s3;
pub mod snapshot;
pub mod spec;
pub mod store;
