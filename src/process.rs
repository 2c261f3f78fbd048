//! Settings of the whole process that many transfers at once need.

/// Many blobs at once are many files and connections. The soft limit of 1,024, or macOS's 256, is
/// there for programs that use select(2); whoever wants less sets the hard one.
pub(crate) fn allow_many_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    const WANTED: u64 = 8_192;
    let limit = getrlimit(Resource::Nofile);
    let current = limit.current.unwrap_or(u64::MAX);
    let raised = limit.maximum.map_or(WANTED, |most| most.min(WANTED));
    if current < raised {
        // Refused, it stays as it is, which is enough for most caches.
        let _ = setrlimit(
            Resource::Nofile,
            Rlimit {
                current: Some(raised),
                maximum: limit.maximum,
            },
        );
    }
}

/// glibc keeps a heap for each thread, up to eight a core, and memory that was freed in one is not
/// used by another: peak memory was a third more, and would grow with the cores.
pub(crate) fn keep_one_heap() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: mallopt has no conditions, and takes its own lock. That it can fail does no harm.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}
