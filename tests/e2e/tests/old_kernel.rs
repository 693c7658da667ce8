//! Deaths of the worker on a kernel before 6.9, which sends nothing again: that of Debian 12, in a machine of its own.

#![allow(clippy::unwrap_used, missing_docs)]

use std::time::Duration;

use millstream_e2e::deaths::{at_work, while_taking_over};
use millstream_e2e::machine::{self, PROGRAM};
use millstream_e2e::need::Need;
use millstream_e2e::stage::can_be_set;

/// For all of it, which takes some eight minutes. An emulated machine is many times slower than a real one.
const DEADLINE: Duration = Duration::from_secs(1200);
/// Of deaths at each kind of moment.
const DEATHS: Duration = Duration::from_secs(120);

#[test]
#[ignore = "eight minutes; make soak"]
fn soak_reads_go_on_when_workers_die_on_the_kernel_of_debian_12() {
    if machine::is_inside() {
        inside();
    } else if can_be_set(&[Need::Program(PROGRAM), Need::Machine]) {
        let name = "soak_reads_go_on_when_workers_die_on_the_kernel_of_debian_12";
        println!("{}", machine::run(name, DEADLINE).unwrap());
    }
}

/// What runs in the machine.
fn inside() {
    assert!(can_be_set(&[]));
    println!("Linux {}", machine::release());
    assert!(machine::release().starts_with("6.1."), "another kernel than the one that is meant");
    let empty = tempfile::tempdir().unwrap();
    assert!(!machine::sends_again(empty.path()).unwrap(), "this kernel would send requests again");
    println!("{}", at_work(DEATHS).unwrap());
    println!("{}", while_taking_over(DEATHS).unwrap());
}
