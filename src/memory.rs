//! How much memory a run may use.

use std::fs;
use std::path::Path;

/// Unless there is little memory. Bytes.
pub const MEMORY: u64 = 160 << 20;

/// What a run needs, however little there is. Bytes.
pub const LEAST: u64 = 32 << 20;

/// The bytes that a run may use: what was asked for; otherwise [`MEMORY`], or a quarter of what is
/// available if that is less. `None`: not known.
pub fn limit(asked: Option<u64>, available: Option<u64>) -> u64 {
    let given = asked.or(available.map(|bytes| (bytes / 4).min(MEMORY)));
    given.unwrap_or(MEMORY).max(LEAST)
}

/// The bytes that the machine can give this process, and its control group allows. `None`: neither is
/// known, as on macOS.
pub fn available() -> Option<u64> {
    let read = |path: &str| fs::read_to_string(path).ok();
    let machine = read("/proc/meminfo").and_then(|text| mem_available(&text));
    let groups = read("/proc/self/cgroup").unwrap_or_default();
    let group = group_limit(&groups, &|path| fs::read_to_string(path).ok());
    machine.into_iter().chain(group).min()
}

/// MemAvailable of /proc/meminfo, in bytes.
fn mem_available(meminfo: &str) -> Option<u64> {
    let mut lines = meminfo.lines();
    let value = lines.find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// The lowest limit of the control groups in `groups`, the text of /proc/self/cgroup, and of those
/// above them: a limit holds for all that is below. In a container the paths may be those of the host,
/// and its own limit is at the root.
fn group_limit(groups: &str, read: &dyn Fn(&Path) -> Option<String>) -> Option<u64> {
    let mut lowest = None;
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(group)) = (fields.next(), fields.next()) else {
            continue;
        };
        let (root, file) = if controllers.is_empty() {
            ("/sys/fs/cgroup", "memory.max")
        } else if controllers.split(',').any(|name| name == "memory") {
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
        } else {
            continue;
        };
        let group = Path::new(group.trim_start_matches('/'));
        for group in group.ancestors() {
            // "max" is no number, and no limit.
            let limit = read(&Path::new(root).join(group).join(file));
            let limit = limit.and_then(|text| text.trim().parse().ok());
            lowest = lowest.into_iter().chain(limit).min();
        }
    }
    lowest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_uses_what_is_asked_for_else_a_quarter_of_what_there_is_up_to_a_limit() {
        assert_eq!(limit(None, None), 160 << 20);
        assert_eq!(limit(None, Some(64 << 30)), 160 << 20);
        assert_eq!(limit(None, Some(400 << 20)), 100 << 20);
        assert_eq!(limit(None, Some(1 << 20)), 32 << 20);
        assert_eq!(limit(Some(64 << 20), Some(100 << 20)), 64 << 20);
        assert_eq!(limit(Some(1 << 30), Some(100 << 20)), 1 << 30);
    }

    #[test]
    fn what_is_available_is_read_in_kib() {
        let text = "MemTotal:  2000 kB\nMemAvailable:     512 kB\nSwapFree: 0 kB\n";
        assert_eq!(mem_available(text), Some(512 << 10));
        assert_eq!(mem_available("MemTotal: 2000 kB\n"), None);
    }

    #[test]
    fn the_tightest_control_group_counts_in_either_version() {
        let files = |path: &Path| {
            let text = match path.to_str()? {
                "/sys/fs/cgroup/ci/job/memory.max" => "max\n",
                "/sys/fs/cgroup/ci/memory.max" => "268435456\n",
                "/sys/fs/cgroup/memory.max" => "536870912\n",
                "/sys/fs/cgroup/memory/memory.limit_in_bytes" => "134217728\n",
                _ => return None,
            };
            Some(text.to_owned())
        };
        assert_eq!(group_limit("0::/ci/job\n", &files), Some(256 << 20));
        // Version 1, in a container that sees the host's path and its own files.
        let old = "5:cpu:/docker/abc\n4:hugetlb,memory:/docker/abc\n0::/\n";
        assert_eq!(group_limit(old, &files), Some(128 << 20));
        assert_eq!(group_limit("3:cpu:/x\nmalformed\n", &files), None);
    }
}
