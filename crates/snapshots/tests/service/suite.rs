//! What containerd's own suite for snapshotters checks, as far as it can be said without Go.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;
use std::time::SystemTime;

use tonic::Code;

use crate::harness::{Labels, Mounted, Service, can_mount, code, labels, tree};

type Step = Box<dyn Fn(&Path)>;

fn step(change: impl Fn(&Path) + 'static) -> Step {
    Box::new(change)
}

fn mkdir(root: &Path, path: &str, mode: u32) {
    fs::create_dir(root.join(path)).unwrap();
    fs::set_permissions(root.join(path), fs::Permissions::from_mode(mode)).unwrap();
}

fn write(root: &Path, path: &str, content: &str) {
    fs::write(root.join(path), content).unwrap();
}

/// Makes one layer of each step, and compares with the same steps made in one plain directory.
async fn check_layers(steps: Vec<Step>) {
    if !can_mount() {
        return;
    }
    let service = Service::start().await;
    let flat = service.directory("flat");
    let mut parent = String::new();
    for (number, step) in steps.iter().enumerate() {
        let key = format!("key-{number}");
        let mounted =
            Mounted::new(&service.prepare(&key, &parent, Labels::new()).await.unwrap(), service.directory(&key));
        assert_eq!(tree(&mounted.0), tree(&flat), "before step {number}");
        step(&flat);
        step(&mounted.0);
        assert_eq!(tree(&mounted.0), tree(&flat), "after step {number}");
        drop(mounted);
        parent = format!("committed-{number}");
        service.commit(&parent, &key, Labels::new()).await.unwrap();
    }
    let view = Mounted::new(&service.view("view", &parent, Labels::new()).await.unwrap(), service.directory("view"));
    assert_eq!(tree(&view.0), tree(&flat));
    assert!(fs::write(view.0.join("new"), "x").is_err(), "a view is read-only");
}

#[tokio::test]
async fn basic() {
    check_layers(vec![
        step(|root| {
            write(root, "foo", "foo");
            mkdir(root, "a", 0o755);
            mkdir(root, "a/b", 0o755);
            mkdir(root, "a/b/c", 0o755);
        }),
        step(|root| {
            write(root, "bar", "bar");
            write(root, "foo", "bar");
            fs::remove_dir_all(root.join("a/b")).unwrap();
        }),
    ])
    .await;
}

#[tokio::test]
async fn deleted_files_stay_deleted() {
    check_layers(vec![
        step(|root| {
            write(root, "foo", "foo");
            write(root, "foobar", "foobar");
        }),
        step(|root| fs::remove_file(root.join("foobar")).unwrap()),
        step(|_| {}),
    ])
    .await;
}

#[tokio::test]
async fn a_replaced_directory_hides_the_old_one() {
    check_layers(vec![
        step(|root| {
            mkdir(root, "lib", 0o700);
            write(root, "lib/hidden", "");
        }),
        step(|root| {
            fs::remove_dir_all(root.join("lib")).unwrap();
            mkdir(root, "lib", 0o700);
            write(root, "lib/not-hidden", "");
        }),
        step(|root| write(root, "lib/new", "")),
    ])
    .await;
}

#[tokio::test]
async fn owners_and_modes() {
    check_layers(vec![
        step(|root| {
            mkdir(root, "opt", 0o700);
            mkdir(root, "opt/a", 0o700);
            write(root, "opt/a/file", "hello");
            mkdir(root, "other", 0o1777);
        }),
        step(|root| {
            for path in ["opt", "opt/a", "opt/a/file"] {
                chown(root.join(path), Some(1), Some(1)).unwrap();
            }
            fs::remove_dir(root.join("other")).unwrap();
        }),
        step(|root| {
            mkdir(root, "other", 0o700);
            chown(root.join("other"), Some(2), Some(3)).unwrap();
            fs::set_permissions(root.join("opt/a/file"), fs::Permissions::from_mode(0o4755)).unwrap();
        }),
    ])
    .await;
}

#[tokio::test]
async fn moves_and_renames() {
    check_layers(vec![
        step(|root| {
            mkdir(root, "dir1", 0o700);
            write(root, "dir1/f1", "was here first");
            write(root, "dir1/f2", "nothing interesting");
            symlink("dangling", root.join("link")).unwrap();
        }),
        step(|root| {
            mkdir(root, "dir2", 0o700);
            write(root, "dir1/f1-new", "new content");
            fs::rename(root.join("dir1/f1-new"), root.join("dir1/f1")).unwrap();
            fs::rename(root.join("dir1/f2"), root.join("dir2/f3")).unwrap();
            fs::rename(root.join("link"), root.join("dir2/link")).unwrap();
            fs::hard_link(root.join("dir1/f1"), root.join("dir2/hard")).unwrap();
            fs::remove_dir_all(root.join("dir1")).unwrap();
        }),
    ])
    .await;
}

#[tokio::test]
async fn a_hundred_and_twenty_eight_layers() {
    let mut steps = vec![step(|root| {
        write(root, "bottom", "way at the bottom");
        write(root, "overwriteme", "FIRST");
        mkdir(root, "addhere", 0o755);
        mkdir(root, "onlyme", 0o755);
        write(root, "onlyme/bottom", "bye");
    })];
    for number in 1..128 {
        steps.push(step(move |root| {
            write(root, "overwriteme", &format!("{number} WAS HERE"));
            write(root, &format!("addhere/file-{number}"), "same");
            fs::remove_dir_all(root.join("onlyme")).unwrap();
            mkdir(root, "onlyme", 0o755);
            write(root, &format!("onlyme/file-{number}"), "only me");
        }));
    }
    check_layers(steps).await;
}

#[tokio::test]
async fn root_permission() {
    if !can_mount() {
        return;
    }
    let service = Service::start().await;
    let mounts = service.prepare("key", "", Labels::new()).await.unwrap();
    let mounted = Mounted::new(&mounts, service.directory("m"));
    assert_eq!(fs::metadata(&mounted.0).unwrap().permissions().mode() & 0o777, 0o755);
    assert!(!mounts[0].options.iter().any(|option| option == "ro"), "an active mount must not be read-only");
}

#[tokio::test]
async fn kinds_and_parents() {
    let service = Service::start().await;
    service.prepare("a", "", Labels::new()).await.unwrap();
    let active = service.stat("a").await.unwrap();
    assert_eq!((active.kind, active.parent.as_str(), active.name.as_str()), (2, "", "a"));
    assert_eq!(code(service.prepare("on-active", "a", Labels::new()).await), Code::InvalidArgument);
    service.commit("A", "a", Labels::new()).await.unwrap();
    assert_eq!(code(service.stat("a").await), Code::NotFound);
    assert_eq!(service.stat("A").await.unwrap().kind, 3);
    service.committed("B", "A").await;
    assert_eq!(service.stat("B").await.unwrap().parent, "A");
    service.view("v", "B", Labels::new()).await.unwrap();
    assert_eq!(service.stat("v").await.unwrap().kind, 1);
    assert_eq!(code(service.prepare("x", "missing", Labels::new()).await), Code::NotFound);
    assert_eq!(code(service.mounts("A").await), Code::FailedPrecondition);
    assert_eq!(code(service.commit("C", "v", Labels::new()).await), Code::FailedPrecondition);
    assert_eq!(code(service.commit("C", "missing", Labels::new()).await), Code::NotFound);
    assert_eq!(code(service.prepare("", "", Labels::new()).await), Code::InvalidArgument);
}

#[tokio::test]
async fn keys_are_unique() {
    let service = Service::start().await;
    service.committed("base", "").await;
    service.prepare("p", "base", Labels::new()).await.unwrap();
    service.view("v", "base", Labels::new()).await.unwrap();
    for key in ["p", "v", "base"] {
        assert_eq!(code(service.prepare(key, "base", Labels::new()).await), Code::AlreadyExists, "{key}");
        assert_eq!(code(service.view(key, "base", Labels::new()).await), Code::AlreadyExists, "{key}");
    }
    assert_eq!(code(service.commit("base", "p", Labels::new()).await), Code::AlreadyExists);
    assert_eq!(service.stat("p").await.unwrap().kind, 2, "a refused commit changes nothing");
}

#[tokio::test]
async fn parents_cannot_be_removed() {
    let service = Service::start().await;
    service.committed("base", "").await;
    service.committed("middle", "base").await;
    service.prepare("top", "middle", Labels::new()).await.unwrap();
    for parent in ["base", "middle"] {
        let error = service.remove(parent).await.unwrap_err();
        assert_eq!(error.code(), Code::FailedPrecondition);
        assert!(error.message().contains("remove"), "{}", error.message());
    }
    for name in ["top", "middle", "base"] {
        service.remove(name).await.unwrap();
        assert_eq!(code(service.remove(name).await), Code::NotFound);
    }
}

#[tokio::test]
async fn keys_can_be_used_again() {
    let service = Service::start().await;
    service.committed("one", "").await;
    service.prepare("reuse", "one", Labels::new()).await.unwrap();
    service.remove("reuse").await.unwrap();
    service.view("reuse", "one", Labels::new()).await.unwrap();
    service.remove("reuse").await.unwrap();
    service.prepare("reuse", "", Labels::new()).await.unwrap();
    service.remove("one").await.unwrap();
    service.commit("one", "reuse", Labels::new()).await.unwrap();
}

#[tokio::test]
async fn times_and_labels() {
    let now = || {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        (i64::try_from(now.as_secs()).unwrap(), i32::try_from(now.subsec_nanos()).unwrap())
    };
    let time = |time: Option<prost_types::Timestamp>| time.map(|time| (time.seconds, time.nanos)).unwrap();
    let service = Service::start().await;
    let before = now();
    service.committed("c1", "").await;
    service.prepare("a1", "c1", Labels::new()).await.unwrap();
    service.view("v1", "c1", Labels::new()).await.unwrap();
    let after = now();
    for name in ["c1", "a1", "v1"] {
        let mut info = service.stat(name).await.unwrap();
        let created = time(info.created_at);
        assert!(before <= created && created <= after, "{name}");
        assert_eq!(info.created_at, info.updated_at, "{name}");
        let parent = info.parent.clone();

        let all = labels(&[("l1", "v1"), ("l2", "v2"), ("l3", "v3"), ("empty", "")]);
        info.parent = "doesnotexist".into();
        info.labels = all;
        let updating = now();
        let mut info = service.update(info, &[]).await.unwrap();
        assert_eq!((time(info.created_at), &info.parent), (created, &parent));
        assert!(time(info.updated_at) >= updating);
        assert_eq!(info.labels, labels(&[("l1", "v1"), ("l2", "v2"), ("l3", "v3")]));

        info.labels = labels(&[("l1", "updated"), ("l4", "v4")]);
        let mut info = service.update(info, &["labels.l1", "labels.l2"]).await.unwrap();
        assert_eq!(info.labels, labels(&[("l1", "updated"), ("l3", "v3")]));

        info.labels = labels(&[("l4", "v4")]);
        let info = service.update(info, &["labels"]).await.unwrap();
        assert_eq!(info.labels, labels(&[("l4", "v4")]));
        assert_eq!(code(service.update(info, &["parent"]).await), Code::InvalidArgument);
    }
    let unknown = millstream_wire::containerd::services::snapshots::v1::Info::default();
    assert_eq!(code(service.update(unknown, &[]).await), Code::NotFound);
}

#[tokio::test]
async fn filters() {
    let service = Service::start().await;
    let root = ("containerd.io/gc.root", "check-walk");
    let gc = || labels(&[root]);
    let with = |value: &str| labels(&[root, ("l", value)]);
    service.prepare("a-np", "", gc()).await.unwrap();
    service.prepare("p-tmp", "", gc()).await.unwrap();
    service.commit("p", "p-tmp", gc()).await.unwrap();
    service.prepare("a", "p", gc()).await.unwrap();
    service.view("v", "p", gc()).await.unwrap();
    service.prepare("p-wl-tmp", "", gc()).await.unwrap();
    service.commit("p-wl", "p-wl-tmp", with("1")).await.unwrap();
    service.prepare("a-wl", "p-wl", with("2")).await.unwrap();
    service.view("v-wl", "p-wl", with("3")).await.unwrap();
    service.prepare("a-np-wl", "", with("2")).await.unwrap();
    service.prepare("other", "", Labels::new()).await.unwrap();
    let walk = "labels.\"containerd.io/gc.root\"==check-walk";
    let and = |filter: &str| format!("{filter},{walk}");
    let cases: [(Vec<String>, &str); 11] = [
        (vec![walk.into()], "a a-np a-np-wl a-wl p p-wl v v-wl"),
        (vec![and("kind==active")], "a a-np a-np-wl a-wl"),
        (vec![and("kind==view")], "v v-wl"),
        (vec![and("kind==committed")], "p p-wl"),
        (vec!["name==p".into(), "name==a-np-wl".into()], "a-np-wl p"),
        (vec!["name==a-wl,labels.l".into()], "a-wl"),
        (vec!["parent==p".into()], "a v"),
        (vec![and("parent!=\"\"")], "a a-wl v v-wl"),
        (vec!["labels.l".into()], "a-np-wl a-wl p-wl v-wl"),
        (vec!["labels.l==2".into()], "a-np-wl a-wl"),
        (vec![], "a a-np a-np-wl a-wl other p p-wl v v-wl"),
    ];
    for (filters, expected) in cases {
        let filters: Vec<&str> = filters.iter().map(String::as_str).collect();
        assert_eq!(service.names(&filters).await.join(" "), expected, "{filters:?}");
    }
    assert_eq!(code(service.list(&["name=p"]).await), Code::InvalidArgument);
}

#[tokio::test]
async fn stat_and_remove_while_a_list_is_read() {
    let service = Service::start().await;
    for number in 0..250 {
        service.prepare(&format!("key-{number:03}"), "", Labels::new()).await.unwrap();
    }
    let request = millstream_wire::containerd::services::snapshots::v1::ListSnapshotsRequest::default();
    let mut stream = service.client.clone().list(request).await.unwrap().into_inner();
    let mut seen = Vec::new();
    while let Some(batch) = stream.message().await.unwrap() {
        for info in batch.info {
            assert_eq!(service.stat(&info.name).await.unwrap(), info);
            service.remove(&info.name).await.unwrap();
            seen.push(info.name);
        }
    }
    assert_eq!(seen.len(), 250);
    assert_eq!(seen.first().map(String::as_str), Some("key-000"));
    assert!(service.names(&[]).await.is_empty());
}
