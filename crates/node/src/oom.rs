//! Whether the kernel's killer of processes has been here. It kills by the same signal as an operator, but counts whom it kills
//! in the victim's control group of memory, whoever's limit was reached, that of a group above or the whole machine's.

use std::fs;
use std::path::{Path, PathBuf};

/// Where control groups are mounted.
const GROUPS: &str = "/sys/fs/cgroup";

/// How many processes of this process's own control group the kernel has killed for want of memory, since the group was made;
/// workers are in the same one. `None` where it does not say: in the root of version 2, or without a mount of the groups.
pub(crate) fn kills() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    count(&fs::read_to_string(counter(&groups)?).ok()?)
}

/// The file with the number, of a process with these groups (cgroups(7)).
fn counter(groups: &str) -> Option<PathBuf> {
    let mut parts = groups.lines().filter_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        Some((parts.next()?, parts.next()?.trim_start_matches('/')))
    });
    // Version 1, also beside version 2: the one that has the controller counts.
    if let Some((_, group)) = parts.clone().find(|(controllers, _)| controllers.split(',').any(|one| one == "memory")) {
        return Some(Path::new(GROUPS).join("memory").join(group).join("memory.oom_control"));
    }
    let (_, group) = parts.find(|(controllers, _)| controllers.is_empty())?;
    Some(Path::new(GROUPS).join(group).join("memory.events"))
}

fn count(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_versions_are_understood() {
        let one = "9:name=systemd:/\n4:memory:/system.slice/millstreamd.service\n1:cpu,cpuacct:/\n0::/elsewhere\n";
        let file = "/sys/fs/cgroup/memory/system.slice/millstreamd.service/memory.oom_control";
        assert_eq!(counter(one), Some(PathBuf::from(file)));
        let two = "1:name=systemd:/\n0::/system.slice/a:b.service\n";
        assert_eq!(counter(two), Some(PathBuf::from("/sys/fs/cgroup/system.slice/a:b.service/memory.events")));
        assert_eq!(counter(""), None);
        assert_eq!(count("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"), Some(3));
        assert_eq!(count("low 0\nhigh 0\nmax 12\noom 2\noom_kill 1\noom_group_kill 0\n"), Some(1));
        assert_eq!(count("oom_kill_disable 0\nunder_oom 0\n"), None);
    }
}
