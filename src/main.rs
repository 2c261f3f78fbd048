//! Hands the command line to the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    layercache::run(std::env::args_os())
}
