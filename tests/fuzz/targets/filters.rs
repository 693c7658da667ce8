//! Filters of containerd's list requests against snapshots with any labels.
#![no_main]

use libfuzzer_sys::fuzz_target;
use millstream_fuzz::plant;
use millstream_snapshots::filter::{Fields, Filters};

const SEEDS: [&str; 6] = [
    "labels.\"containerd.io/snapshot.ref\"==sha256:ab,parent==\"\"\nsha256:ab",
    "kind==committed,name~=/^k8s\\.io\\/[0-9]+/\nk8s.io/12/x",
    "parent!=\"\",labels.a.b~=|^(x\\|y)*$|\nxyx",
    "name==\"\\x41\\u00f6\\101\\U0001F600\\\"\"\nA",
    "labels.\"a\\\"b\"\n\"",
    "kind == active, parent\nactive",
];

/// Every field of it has the same value.
struct Object<'a>(&'a str);

impl Fields for Object<'_> {
    fn field(&self, path: &[String]) -> Option<&str> {
        (path.len() < 4).then_some(self.0)
    }
}

/// Go's `%q` as far as it matters: how containerd writes a parent into its own queries.
fn quoted(text: &str) -> String {
    let mut quoted = String::from('"');
    for character in text.chars() {
        match character {
            '"' | '\\' => quoted.extend(['\\', character]),
            control if control.is_control() => quoted.push_str(&format!("\\U{:08x}", u32::from(control))),
            other => quoted.push(other),
        }
    }
    quoted + "\""
}

fuzz_target!(init: plant(SEEDS.map(|seed| seed.as_bytes().to_vec())), |data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (filters, value) = text.rsplit_once('\n').unwrap_or((text, ""));
    let parts: Vec<&str> = filters.split('\n').collect();
    if let Ok(filters) = Filters::parse(&parts) {
        filters.matches(&Object(value));
    }
    if value.len() < 1024 {
        let found = Filters::parse(&[format!("name=={0},labels.{0}=={0}", quoted(value))]);
        assert!(found.is_ok_and(|filters| filters.matches(&Object(value))), "{value:?} does not find itself");
    }
});
