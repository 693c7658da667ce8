//! The remote contract: skipping layers.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use millstream_oci::Digest;
use millstream_snapshots::{Options, PrepareOutcome};
use tonic::Code;

use crate::harness::{Labels, Mounted, Service, can_mount, code, eventually, labels};

pub(crate) const REF: &str = "containerd.io/snapshot.ref";

pub(crate) fn target(name: &str) -> String {
    Digest::of(format!("chain {name}").as_bytes()).to_string()
}

pub(crate) fn offer(target: &str) -> Labels {
    labels(&[(REF, target), ("containerd.io/snapshot/cri.image-ref", "docker.io/library/nginx:1")])
}

/// What containerd's metadata layer asks after `ALREADY_EXISTS`: the committed snapshots that it finds.
pub(crate) async fn search(service: &Service, target: &str, parent: &str) -> Vec<String> {
    let filter = format!("labels.\"{REF}\"=={target},parent==\"{parent}\"");
    let mut found = service.list(&[&filter]).await.unwrap();
    found.retain(|info| info.kind == 3);
    assert!(found.iter().all(|info| info.parent == parent && info.labels[REF] == target));
    found.into_iter().map(|info| info.name).collect()
}

/// Skips a layer as containerd does, and gives the name of its snapshot.
pub(crate) async fn skip(service: &Service, key: &str, parent: &str, target: &str) -> String {
    assert_eq!(code(service.prepare(key, parent, offer(target)).await), Code::AlreadyExists);
    assert_eq!(code(service.stat(key).await), Code::NotFound, "the extract key leaked");
    let mut found = search(service, target, parent).await;
    assert_eq!(found.len(), 1, "{found:?}");
    found.remove(0)
}

#[tokio::test]
async fn a_lazy_image_and_a_container_on_it() {
    let service = Service::start().await;
    let (one, two) = (target("1"), target("2"));
    service.images.lazy(&one, |dir| fs::write(dir.join("file"), "lower").unwrap());
    service.images.lazy(&two, |dir| fs::write(dir.join("second"), "two").unwrap());
    let first = skip(&service, "k8s.io/1/extract-1 a", "", &one).await;
    let second = skip(&service, "k8s.io/2/extract-2 b", &first, &two).await;
    let info = service.stat(&second).await.unwrap();
    assert_eq!(info.labels, offer(&two), "all labels are kept");
    assert_eq!(info.created_at, info.updated_at);
    let usage = service.usage(&second).await.unwrap();
    assert_eq!((usage.size, usage.inodes), (123_456, 7));

    let mounts = service.prepare("k8s.io/3/container", &second, Labels::new()).await.unwrap();
    assert_eq!(mounts, service.mounts("k8s.io/3/container").await.unwrap());
    let options = mounts[0].options.join(",");
    assert!(options.contains("xino=on") && options.contains("index=off"), "{options}");
    let lowers = mounts[0].options.iter().find_map(|option| option.strip_prefix("lowerdir=")).unwrap();
    assert!(!lowers.contains(':'), "two lazy layers are one lower directory: {lowers}");
    if can_mount() {
        let mounted = Mounted::new(&mounts, service.directory("m"));
        assert_eq!(fs::read(mounted.0.join("second")).unwrap(), b"two");
        fs::write(mounted.0.join("file"), "upper").unwrap();
        assert_eq!(fs::read(mounted.0.join("file")).unwrap(), b"upper");
    }
    let view = service.view("k8s.io/4/view", &second, Labels::new()).await.unwrap();
    assert_eq!((view[0].r#type.as_str(), view[0].source.as_str()), ("bind", lowers));
    assert_eq!(service.images.decisions(), 2);
}

#[tokio::test]
async fn repeating_is_answered_from_what_is_there() {
    let service = Service::start().await;
    let one = target("1");
    service.images.lazy(&one, |_| {});
    let first = skip(&service, "k8s.io/1/extract-1 a", "", &one).await;
    assert_eq!(skip(&service, "k8s.io/1/extract-1 a", "", &one).await, first);
    assert_eq!(skip(&service, "k8s.io/2/extract-2 a", "", &one).await, first);
    assert_eq!(service.images.decisions(), 1);
}

#[tokio::test]
async fn parallel_requests_make_one_snapshot() {
    let service = Arc::new(Service::start().await);
    let one = target("1");
    service.images.lazy(&one, |_| {});
    *service.images.delay.lock().unwrap() = Duration::from_millis(50);
    let tasks: Vec<_> = (0..16)
        .map(|number| {
            let (service, labels) = (Arc::clone(&service), offer(&one));
            tokio::spawn(async move { service.prepare(&format!("k8s.io/{number}/x"), "", labels).await })
        })
        .collect();
    for task in tasks {
        assert_eq!(code(task.await.unwrap()), Code::AlreadyExists);
    }
    assert_eq!(search(&service, &one, "").await.len(), 1);
    assert_eq!(service.names(&[]).await.len(), 1);
}

#[tokio::test]
async fn another_namespace_has_to_prove_its_right() {
    let service = Service::start().await;
    let one = target("1");
    service.images.lazy(&one, |_| {});
    let first = skip(&service, "k8s.io/1/a", "", &one).await;
    let denied = PrepareOutcome::deferred("registry.denied", "no");
    let lazy = service.images.outcomes.lock().unwrap().insert(one.clone(), denied).unwrap();
    service.prepare_as("moby", "moby/1/a", "", offer(&one)).await.expect("it has to unpack the layer itself");
    service.images.answer(&one, lazy);
    assert_eq!(code(service.prepare_as("moby", "moby/2/a", "", offer(&one)).await), Code::AlreadyExists);
    assert_eq!(search(&service, &one, "").await, [first]);
    let asked = service.images.decisions();
    assert_eq!(code(service.prepare_as("moby", "moby/3/a", "", offer(&one)).await), Code::AlreadyExists);
    assert_eq!(service.images.decisions(), asked, "proven once");
}

#[tokio::test]
async fn only_what_no_snapshot_shows_is_given_back_on_request() {
    let service = Service::start().await;
    let one = target("one");
    service.images.lazy(&one, |_| {});
    skip(&service, "k8s.io/1/a", "", &one).await;
    let (shown, never) = (Digest::of(one.as_bytes()), Digest::of(b"decided, then the client went away"));
    service.snapshots.release_unused(vec![shown, never]).await.unwrap();
    assert_eq!(*service.images.released.lock().unwrap(), [never]);
}

#[tokio::test]
async fn the_same_layer_over_another_parent_is_another_snapshot() {
    let service = Service::start().await;
    let (base, other, top) = (target("base"), target("other"), target("top"));
    for target in [&base, &other, &top] {
        service.images.lazy(target, |_| {});
    }
    let base = skip(&service, "k8s.io/1/a", "", &base).await;
    let other = skip(&service, "k8s.io/2/a", "", &other).await;
    let on_base = skip(&service, "k8s.io/3/a", &base, &top).await;
    let on_other = skip(&service, "k8s.io/4/a", &other, &top).await;
    assert_ne!(on_base, on_other);
    // One layer, two snapshots: it is given back with the second.
    service.remove(&on_base).await.unwrap();
    assert!(service.images.released.lock().unwrap().is_empty());
    assert_eq!(service.snapshots.layers().unwrap().len(), 3);
    service.remove(&on_other).await.unwrap();
    assert_eq!(*service.images.released.lock().unwrap(), [Digest::of(top.as_bytes())]);
    assert_eq!(service.snapshots.layers().unwrap().len(), 2);
}

#[tokio::test]
async fn a_deferred_layer_is_unpacked_by_containerd() {
    let service = Service::start().await;
    let (one, two, three) = (target("1"), target("2"), target("3"));
    service.images.lazy(&one, |dir| fs::write(dir.join("one"), "1").unwrap());
    service.images.lazy(&three, |dir| fs::write(dir.join("three"), "3").unwrap());
    service.images.answer(&two, PrepareOutcome::deferred("image.not-eligible", "hint: none"));
    let first = skip(&service, "k8s.io/1/a", "", &one).await;
    let mounts = service.prepare("k8s.io/2/b", &first, offer(&two)).await.unwrap();
    assert_eq!(mounts[0].r#type, "overlay");
    assert!(!mounts[0].options.iter().any(|option| option == "ro"));
    if can_mount() {
        let mounted = Mounted::new(&mounts, service.directory("m"));
        fs::write(mounted.0.join("two"), "2").unwrap();
        fs::remove_file(mounted.0.join("one")).unwrap();
    }
    service.commit("k8s.io/3/two", "k8s.io/2/b", offer(&two)).await.unwrap();
    assert_eq!(search(&service, &two, &first).await, ["k8s.io/3/two"]);
    // lazy, local, lazy
    let third = skip(&service, "k8s.io/4/c", "k8s.io/3/two", &three).await;
    let mounts = service.view("k8s.io/5/view", &third, Labels::new()).await.unwrap();
    let lowers = mounts[0].options.iter().find_map(|option| option.strip_prefix("lowerdir=")).unwrap();
    assert_eq!(lowers.split(':').count(), 3);
    if can_mount() {
        let mounted = Mounted::new(&mounts, service.directory("v"));
        let mut names: Vec<_> = fs::read_dir(&mounted.0).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["three", "two"]);
    }
}

#[tokio::test]
async fn broken_decisions_fall_back_as_well() {
    let service = Service::start().await;
    let one = target("1");
    let reason = millstream_snapshots::Reason::new("node.local", "the store is broken");
    service.images.answer(&one, PrepareOutcome::Failed { reason });
    service.prepare("k8s.io/1/a", "", offer(&one)).await.expect("a pull never fails because of us");
    let odd = labels(&[(REF, "not a chain ID")]);
    service.prepare("k8s.io/2/a", "", odd).await.expect("unpacked by containerd");
    assert_eq!(service.images.decisions(), 1);
}

#[tokio::test]
async fn a_slow_decision_is_a_deferral() {
    let service = Service::start().await;
    let options = Options { decide_deadline: Duration::from_millis(100), ..Options::default() };
    let temp = Arc::new(tempfile::tempdir().unwrap());
    let service = Service::start_in(temp, Arc::clone(&service.images), options).await;
    let one = target("1");
    service.images.lazy(&one, |_| {});
    *service.images.delay.lock().unwrap() = Duration::from_secs(3600);
    let start = Instant::now();
    service.prepare("k8s.io/1/a", "", offer(&one)).await.expect("an ordinary snapshot");
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    let answered = service.images.answered.lock().unwrap().clone();
    assert!(
        matches!(&answered[..], [PrepareOutcome::Deferred { reason }] if reason.code == "node.slow"),
        "{answered:?}"
    );
}

#[tokio::test]
async fn nothing_is_decided_without_need() {
    let service = Service::start().await;
    service.prepare("k8s.io/1/a", "", Labels::new()).await.unwrap();
    assert_eq!(code(service.prepare("k8s.io/1/a", "", offer(&target("1"))).await), Code::AlreadyExists);
    assert_eq!(code(service.prepare("k8s.io/2/a", "missing", offer(&target("1"))).await), Code::NotFound);
    assert_eq!(service.images.decisions(), 0);
}

#[tokio::test]
async fn a_layer_that_is_given_up_during_the_decision_is_deferred() {
    let service = Arc::new(Service::start().await);
    let (one, base) = (target("1"), target("base"));
    let layer = service.images.lazy(&one, |_| {});
    service.images.lazy(&base, |_| {});
    let base = skip(&service, "k8s.io/1/a", "", &base).await;
    let first = skip(&service, "k8s.io/2/a", "", &one).await;
    let asked = service.images.decisions();
    *service.images.delay.lock().unwrap() = Duration::from_millis(300);
    let deciding = {
        let (service, labels) = (Arc::clone(&service), offer(&one));
        tokio::spawn(async move { service.prepare("k8s.io/3/a", &base, labels).await })
    };
    eventually(|| service.images.decided.load(Ordering::SeqCst) > asked).await;
    service.remove(&first).await.unwrap();
    assert_eq!(*service.images.released.lock().unwrap(), [layer]);
    deciding.await.unwrap().expect("an ordinary snapshot");
    let last = service.images.answered.lock().unwrap().last().cloned();
    assert!(matches!(&last, Some(PrepareOutcome::Deferred { reason }) if reason.code == "node.released"), "{last:?}");
    assert!(!service.snapshots.layers().unwrap().contains(&layer));
}

#[tokio::test]
async fn a_parent_that_goes_during_the_decision() {
    let service = Arc::new(Service::start().await);
    let one = target("1");
    service.images.lazy(&one, |_| {});
    service.committed("base", "").await;
    *service.images.delay.lock().unwrap() = Duration::from_millis(300);
    let deciding = {
        let (service, labels) = (Arc::clone(&service), offer(&one));
        tokio::spawn(async move { service.prepare("k8s.io/1/a", "base", labels).await })
    };
    eventually(|| service.images.decisions() > 0).await;
    service.remove("base").await.unwrap();
    assert_eq!(code(deciding.await.unwrap()), Code::NotFound);
}

#[tokio::test]
async fn layers_that_cannot_be_shown_leave_nothing_behind() {
    let service = Service::start().await;
    let one = target("1");
    let layer = Digest::of(b"lost");
    service.images.answer(&one, PrepareOutcome::Lazy { layer });
    let name = skip(&service, "k8s.io/1/a", "", &one).await;
    let error = service.prepare("k8s.io/2/container", &name, Labels::new()).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    assert!(error.message().contains("layer.lost"), "{}", error.message());
    assert_eq!(service.names(&[]).await, [name]);
}

#[tokio::test]
async fn a_commit_cannot_change_the_parent() {
    let service = Service::start().await;
    service.committed("base", "").await;
    service.committed("other", "").await;
    service.prepare("key", "base", Labels::new()).await.unwrap();
    service.prepare("free", "", Labels::new()).await.unwrap();
    let commit = |key: &str, parent: &str| {
        let request = millstream_wire::containerd::services::snapshots::v1::CommitSnapshotRequest {
            name: format!("{key}-committed"),
            key: key.into(),
            parent: parent.into(),
            ..Default::default()
        };
        let mut client = service.client.clone();
        async move { client.commit(request).await.map(drop) }
    };
    assert_eq!(code(commit("key", "other").await), Code::InvalidArgument);
    assert_eq!(code(commit("free", "base").await), Code::InvalidArgument, "no rebase");
    commit("key", "base").await.unwrap();
}
