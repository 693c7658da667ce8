//! Restarts, what a crash leaves behind, and what happens in the background.

use std::fs;
use std::path::Path;

use tonic::Code;

use crate::harness::{Labels, Service, can_mount, code, eventually, labels};

fn directories(root: &Path) -> Vec<String> {
    let entries = fs::read_dir(root.join("s")).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn trash(root: &Path) -> usize {
    fs::read_dir(root.join("trash")).unwrap().count()
}

#[tokio::test]
async fn everything_survives_a_restart() {
    let service = Service::start().await;
    service.committed("base", "").await;
    service.prepare("key", "base", labels(&[("a", "b")])).await.unwrap();
    service.prepare("gone", "base", Labels::new()).await.unwrap();
    service.remove("gone").await.unwrap();
    let (mounts, infos) = (service.mounts("key").await.unwrap(), service.list(&[]).await.unwrap());
    let service = service.restart(|_| {}).await;
    assert_eq!(service.mounts("key").await.unwrap(), mounts);
    assert_eq!(service.list(&[]).await.unwrap(), infos);
    assert!(service.snapshots.damaged().is_empty());
    service.prepare("new", "", Labels::new()).await.unwrap();
    // base 1, key 2, gone 3: numbers are never used twice.
    assert_eq!(directories(&service.temp.path().join("root")), ["1", "2", "4"]);
    assert_eq!(code(service.remove("base").await), Code::FailedPrecondition);
}

#[tokio::test]
async fn leftovers_are_deleted_and_losses_reported() {
    let service = Service::start().await;
    for name in ["good", "lost", "half"] {
        service.committed(name, "").await;
    }
    service.prepare("on-lost", "lost", Labels::new()).await.unwrap();
    let service = service
        .restart(|root| {
            for orphan in ["s/99/fs/deep", "s/new-1", "s/07", "trash/5/x"] {
                fs::create_dir_all(root.join(orphan)).unwrap();
            }
            fs::write(root.join("s/file"), "x").unwrap();
            fs::remove_dir_all(root.join("s/2")).unwrap();
            fs::remove_dir_all(root.join("s/3/fs")).unwrap();
        })
        .await;
    let root = service.temp.path().join("root");
    assert_eq!(directories(&root), ["1", "3", "4"]);
    eventually(|| trash(&root) == 0).await;
    let damaged: Vec<_> = service.snapshots.damaged().into_iter().map(|damage| damage.name).collect();
    assert_eq!(damaged, ["lost", "half"]);
    let error = service.mounts("on-lost").await.unwrap_err();
    assert_eq!(error.code(), Code::DataLoss);
    assert!(error.message().contains("lost") && error.message().contains("hint:"), "{}", error.message());
    assert_eq!(service.usage("lost").await.unwrap().size, 0, "what is gone takes no space");
    service.prepare("on-good", "good", Labels::new()).await.expect("the others work");
    service.remove("on-lost").await.unwrap();
    service.remove("lost").await.expect("damaged snapshots can be removed");
    assert_eq!(service.snapshots.damaged().len(), 1);
    service.committed("lost", "").await;
    service.prepare("again", "lost", Labels::new()).await.expect("and made again");
}

#[tokio::test]
async fn removed_files_are_deleted_in_the_background() {
    let service = Service::start().await;
    let root = service.temp.path().join("root");
    service.prepare("key", "", Labels::new()).await.unwrap();
    fs::create_dir_all(root.join("s/1/fs/a/b/c")).unwrap();
    service.remove("key").await.unwrap();
    assert!(directories(&root).is_empty());
    eventually(|| trash(&root) == 0).await;
}

#[tokio::test]
async fn cleanup_takes_orphans_only() {
    let service = Service::start().await;
    let root = service.temp.path().join("root");
    service.committed("base", "").await;
    service.prepare("key", "base", Labels::new()).await.unwrap();
    fs::create_dir_all(root.join("s/1234/fs")).unwrap();
    service.cleanup().await;
    assert_eq!(directories(&root), ["1", "2"]);
    eventually(|| trash(&root) == 0).await;
}

#[tokio::test]
async fn a_mount_point_in_the_trash_is_left_alone() {
    if !can_mount() {
        return;
    }
    let service = Service::start().await;
    let root = service.temp.path().join("root");
    let precious = service.directory("precious");
    fs::write(precious.join("file"), "x").unwrap();
    service.prepare("key", "", Labels::new()).await.unwrap();
    let inside = root.join("s/1/fs/mnt");
    fs::create_dir(&inside).unwrap();
    rustix::mount::mount_bind(&precious, &inside).unwrap();
    service.remove("key").await.unwrap();
    // Something behind it in the queue shows that the pass is over.
    eventually(|| !root.join("s/1").exists()).await;
    service.prepare("next", "", Labels::new()).await.unwrap();
    service.remove("next").await.unwrap();
    service.cleanup().await;
    eventually(|| trash(&root) <= 2).await;
    assert!(precious.join("file").exists());
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let trash_path = root.join("trash");
    for line in mounts.lines() {
        let target = line.split(' ').nth(1).unwrap_or_default();
        if Path::new(target).starts_with(&trash_path) {
            rustix::mount::unmount(target, rustix::mount::UnmountFlags::DETACH).unwrap();
        }
    }
    service.cleanup().await;
    eventually(|| trash(&root) == 0).await;
    assert!(precious.join("file").exists());
}

#[tokio::test]
async fn usage_of_each_kind() {
    let service = Service::start().await;
    let root = service.temp.path().join("root");
    service.prepare("key", "", Labels::new()).await.unwrap();
    fs::write(root.join("s/1/fs/file"), vec![1; 1 << 20]).unwrap();
    let active = service.usage("key").await.unwrap();
    assert!((1 << 20..2 << 20).contains(&active.size), "{active:?}");
    assert_eq!(active.inodes, 2);
    service.commit("base", "key", Labels::new()).await.unwrap();
    assert_eq!(service.usage("base").await.unwrap(), active);
    service.view("view", "base", Labels::new()).await.unwrap();
    assert_eq!(service.usage("view").await.unwrap().size, 0);
    assert_eq!(code(service.usage("missing").await), Code::NotFound);
    // It is stored: the directory is not read again.
    let service = service.restart(|root| fs::write(root.join("s/1/fs/more"), vec![1; 1 << 20]).unwrap()).await;
    assert_eq!(service.usage("base").await.unwrap(), active);
}

#[tokio::test]
async fn usage_that_was_not_added_up_before_a_crash() {
    let service = Service::start().await;
    for number in 0..20 {
        service.prepare(&format!("key-{number}"), "", Labels::new()).await.unwrap();
        service.commit(&format!("c-{number}"), &format!("key-{number}"), Labels::new()).await.unwrap();
    }
    let service = service.restart(|_| {}).await;
    for number in 0..20 {
        assert_eq!(service.usage(&format!("c-{number}")).await.unwrap().inodes, 1, "{number}");
    }
}
