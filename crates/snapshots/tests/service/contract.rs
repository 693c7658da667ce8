//! The remote contract beyond the plain pull: retries, garbage collection, labels, odd names, many callers. README.md has the
//! whole list.

use std::sync::Arc;
use std::time::Duration;

use millstream_snapshots::PrepareOutcome;
use tonic::Code;

use crate::harness::{Labels, Service, code, eventually, labels};
use crate::remote::{REF, offer, search, skip, target};

fn lower_directories(mounts: &[millstream_wire::containerd::types::Mount]) -> usize {
    let lowers = mounts[0].options.iter().find_map(|option| option.strip_prefix("lowerdir="));
    lowers.map_or(0, |lowers| lowers.split(':').count())
}

#[tokio::test]
async fn a_prepare_that_the_client_gave_up_can_be_repeated() {
    let service = Arc::new(Service::start().await);
    let one = target("1");
    service.images.lazy(&one, |_| {});
    *service.images.delay.lock().unwrap() = Duration::from_millis(300);
    let given_up = {
        let (service, labels) = (Arc::clone(&service), offer(&one));
        tokio::spawn(async move { service.prepare("k8s.io/1/extract-1 a", "", labels).await })
    };
    eventually(|| service.images.decisions() == 1).await;
    given_up.abort();
    assert!(given_up.await.unwrap_err().is_cancelled());
    // The same key and another: the unpacker takes a new one for each try, but nothing depends on that.
    let first = skip(&service, "k8s.io/1/extract-1 a", "", &one).await;
    assert_eq!(skip(&service, "k8s.io/2/extract-2 a", "", &one).await, first);
    assert_eq!(service.names(&[]).await, [first]);
}

#[tokio::test]
async fn a_pull_that_failed_goes_on_where_it_was() {
    let service = Service::start().await;
    let (one, two, three) = (target("1"), target("2"), target("3"));
    service.images.lazy(&one, |_| {});
    service.images.lazy(&three, |_| {});
    let first = skip(&service, "k8s.io/1/extract-1 a", "", &one).await;
    // The download of the second layer fails: its key stays, and is nobody's.
    service.prepare("k8s.io/2/extract-2 b", &first, offer(&two)).await.unwrap();
    let decided = service.images.decisions();

    assert_eq!(skip(&service, "k8s.io/3/extract-3 a", "", &one).await, first);
    assert_eq!(service.images.decisions(), decided, "what is there is not asked about again");
    service.prepare("k8s.io/4/extract-4 b", &first, offer(&two)).await.unwrap();
    service.commit("k8s.io/5/two", "k8s.io/4/extract-4 b", offer(&two)).await.unwrap();
    let third = skip(&service, "k8s.io/6/extract-6 c", "k8s.io/5/two", &three).await;
    // Garbage collection takes the key of the failed try.
    service.remove("k8s.io/2/extract-2 b").await.unwrap();
    let mut expected = [first, "k8s.io/5/two".to_owned(), third];
    expected.sort();
    assert_eq!(service.names(&[]).await, expected);
}

#[tokio::test]
async fn clients_that_offer_nothing_unpack_on_lazy_layers() {
    let service = Service::start().await;
    let one = target("1");
    service.images.lazy(&one, |_| {});
    let first = skip(&service, "k8s.io/1/extract-1 a", "", &one).await;
    let decided = service.images.decisions();
    // As `ctr run` and image volumes do: neither snapshot.ref nor any other label.
    let mounts = service.prepare("k8s.io/2/extract-2 b", &first, Labels::new()).await.unwrap();
    assert_eq!((mounts[0].r#type.as_str(), lower_directories(&mounts)), ("overlay", 1));
    service.commit("k8s.io/3/two", "k8s.io/2/extract-2 b", Labels::new()).await.unwrap();
    assert_eq!(service.images.decisions(), decided);
    let container = service.prepare("k8s.io/4/container", "k8s.io/3/two", Labels::new()).await.unwrap();
    assert_eq!(lower_directories(&container), 2);
}

#[tokio::test]
async fn a_snapshot_is_committed_once() {
    let service = Service::start().await;
    service.prepare("one", "", Labels::new()).await.unwrap();
    service.prepare("two", "", Labels::new()).await.unwrap();
    service.commit("name", "one", Labels::new()).await.unwrap();
    let committed = service.stat("name").await.unwrap();
    assert_eq!(code(service.commit("name", "one", Labels::new()).await), Code::AlreadyExists);
    assert_eq!(code(service.commit("other", "one", Labels::new()).await), Code::NotFound);
    assert_eq!(code(service.commit("name", "two", Labels::new()).await), Code::AlreadyExists);
    assert_eq!(code(service.commit("again", "name", Labels::new()).await), Code::FailedPrecondition);
    assert_eq!(service.stat("name").await.unwrap(), committed);
    service.mounts("two").await.expect("what could not be committed is as it was");
}

#[tokio::test]
async fn garbage_collection_goes_from_the_top_and_gives_layers_back() {
    let service = Service::start().await;
    let (one, two, three) = (target("1"), target("2"), target("3"));
    let bottom = service.images.lazy(&one, |_| {});
    let top = service.images.lazy(&three, |_| {});
    let first = skip(&service, "k8s.io/1/a", "", &one).await;
    service.prepare("k8s.io/2/b", &first, offer(&two)).await.unwrap();
    let second = "k8s.io/3/two";
    service.commit(second, "k8s.io/2/b", offer(&two)).await.unwrap();
    let third = skip(&service, "k8s.io/4/c", second, &three).await;
    service.prepare("k8s.io/5/container", &third, Labels::new()).await.unwrap();
    service.view("k8s.io/6/view", &third, Labels::new()).await.unwrap();

    for below in [&first, second, &third] {
        assert_eq!(code(service.remove(below).await), Code::FailedPrecondition, "{below}");
    }
    assert_eq!(service.names(&[]).await.len(), 5, "a refused removal removes nothing");
    let released = || service.images.released.lock().unwrap().clone();
    for name in ["k8s.io/6/view", "k8s.io/5/container", &third] {
        service.remove(name).await.unwrap();
    }
    assert_eq!(released(), [top]);
    service.remove(second).await.unwrap();
    service.remove(&first).await.unwrap();
    assert_eq!(released(), [top, bottom]);
    service.cleanup().await;
    assert!(service.names(&[]).await.is_empty());
    skip(&service, "k8s.io/7/a", "", &one).await;
}

#[tokio::test]
async fn labels_of_lazy_snapshots_change_by_path_and_searches_follow() {
    let service = Service::start().await;
    let one = target("1");
    service.images.lazy(&one, |_| {});
    let first = skip(&service, "k8s.io/1/a", "", &one).await;
    let mut info = service.stat(&first).await.unwrap();
    info.labels = labels(&[("containerd.io/gc.root", "now"), ("other", "x")]);
    let info = service.update(info, &["labels.containerd.io/gc.root"]).await.unwrap();
    let mut expected = offer(&one);
    expected.insert("containerd.io/gc.root".into(), "now".into());
    assert_eq!(info.labels, expected, "no other label is touched");
    assert_eq!(search(&service, &one, "").await, [first.as_str()]);

    // Whoever takes the label away makes it a snapshot like any other; the next pull makes another one.
    let bare = service.update(info.clone(), &["labels"]).await.unwrap();
    assert_eq!(bare.labels, expected);
    let without = service
        .update(
            millstream_wire::containerd::services::snapshots::v1::Info { labels: Labels::new(), ..info.clone() },
            &[&format!("labels.{REF}")],
        )
        .await
        .unwrap();
    assert!(!without.labels.contains_key(REF));
    assert!(search(&service, &one, "").await.is_empty());
    let next = skip(&service, "k8s.io/2/a", "", &one).await;
    assert_ne!(next, first);
    service.update(info, &[]).await.unwrap();
    assert_eq!(search(&service, &one, "").await.len(), 2, "and finds it again when the label is back");
}

/// Go's `%q`, with which containerd writes a parent into a filter.
fn quoted(text: &str) -> String {
    let mut quoted = String::from('"');
    for character in text.chars() {
        match character {
            '"' | '\\' => quoted.extend(['\\', character]),
            '\n' => quoted.push_str("\\n"),
            '\t' => quoted.push_str("\\t"),
            other => quoted.push(other),
        }
    }
    quoted + "\""
}

#[tokio::test]
async fn keys_may_be_any_text() {
    let service = Service::start().await;
    let long = "k".repeat(4096);
    let keys = [
        "k8s.io/1/extract-467847192-i-Km sha256:ab",
        "k8s.io/2/extract-879648340--Cs_ sha256:ab",
        "/tmp/extract/preparing",
        "../../etc",
        "..",
        "a,b==c",
        "say \"when\" \\ now",
        "line\nbreak\tand tab",
        "größe/日本/🦀",
        "lazy-1",
        "k8s.io/lazy-1/sha256:ab",
        " ",
        &long,
    ];
    for (number, key) in keys.into_iter().enumerate() {
        let (active, child) = (format!("active-{number}"), format!("child-{number}"));
        service.prepare(key, "", Labels::new()).await.unwrap_or_else(|error| panic!("{key:?}: {error}"));
        assert_eq!(service.stat(key).await.unwrap().name, key);
        service.mounts(key).await.unwrap();
        assert_eq!(service.names(&[&format!("name=={}", quoted(key))]).await, [key]);
        service.remove(key).await.unwrap();
        // And as the name of a parent, with a layer offered on it.
        service.prepare(&active, "", Labels::new()).await.unwrap();
        service.commit(key, &active, Labels::new()).await.unwrap();
        service.view(&child, key, Labels::new()).await.unwrap();
        assert_eq!(service.names(&[&format!("parent=={}", quoted(key))]).await, [child.as_str()]);
        let one = target(key);
        service.images.lazy(&one, |_| {});
        let filter = format!("labels.\"{REF}\"=={one},parent=={}", quoted(key));
        assert_eq!(code(service.prepare("extract", key, offer(&one)).await), Code::AlreadyExists);
        let found = service.names(&[&filter]).await;
        assert_eq!(found.len(), 1, "{key:?}");
        for name in [&found[0], &child, key] {
            service.remove(name).await.unwrap();
        }
    }
    for refused in ["", &"k".repeat(4097)] {
        assert_eq!(code(service.prepare(refused, "", Labels::new()).await), Code::InvalidArgument);
        assert_eq!(code(service.view(refused, "", Labels::new()).await), Code::InvalidArgument);
    }
    assert!(service.names(&[]).await.is_empty());
}

#[tokio::test]
async fn many_namespaces_share_a_snapshot_after_one_proof_each() {
    let service = Service::start().await;
    let one = target("1");
    service.images.lazy(&one, |_| {});
    let first = skip(&service, "k8s.io/1/a", "", &one).await;
    let namespaces: Vec<&'static str> = (0..50).map(|number| &*format!("tenant-{number}").leak()).collect();
    for (proofs, namespace) in (2..).zip(&namespaces) {
        let key = format!("{namespace}/1/a");
        assert_eq!(code(service.prepare_as(namespace, &key, "", offer(&one)).await), Code::AlreadyExists);
        assert_eq!(service.images.decisions(), proofs);
    }
    assert_eq!(search(&service, &one, "").await, [first.as_str()]);
    let service = service.restart(|_| {}).await;
    for namespace in namespaces {
        let key = format!("{namespace}/2/a");
        assert_eq!(code(service.prepare_as(namespace, &key, "", offer(&one)).await), Code::AlreadyExists);
    }
    assert_eq!(service.images.decisions(), 51, "proven once, and remembered");
    assert_eq!(service.names(&[]).await, [first]);
}

#[tokio::test]
async fn namespaces_that_look_alike_prove_their_own_right() {
    let service = Service::start().await;
    let one = target("1");
    service.images.lazy(&one, |_| {});
    let first = skip(&service, "k8s.io/1/a", "", &one).await;
    assert_eq!(first, format!("k8s.io/lazy-1/{one}"));
    service.images.answer(&one, PrepareOutcome::deferred("registry.denied", "no"));
    for (number, namespace) in ["k8s", "k8s.io.b", "K8S.IO", "k8s.io/lazy-1", "default"].into_iter().enumerate() {
        let key = format!("x/{number}/a");
        let answer = service.prepare_as(namespace, &key, "", offer(&one)).await;
        answer.unwrap_or_else(|error| panic!("{namespace} has proven nothing: {error}"));
    }
}

#[tokio::test]
async fn one_layer_that_two_clients_unpack_at_once() {
    let service = Service::start().await;
    let one = target("1");
    for key in ["k8s.io/1/extract-1 a", "k8s.io/2/extract-2 a"] {
        service.prepare(key, "", offer(&one)).await.unwrap();
    }
    service.commit("k8s.io/3/one", "k8s.io/1/extract-1 a", offer(&one)).await.unwrap();
    // containerd's metadata layer holds one of the two back; if not, both stand.
    service.commit("k8s.io/4/one", "k8s.io/2/extract-2 a", offer(&one)).await.unwrap();
    assert_eq!(search(&service, &one, "").await, ["k8s.io/3/one", "k8s.io/4/one"]);
    assert_eq!(code(service.prepare("k8s.io/5/extract-5 a", "", offer(&one)).await), Code::AlreadyExists);
    service.remove("k8s.io/3/one").await.unwrap();
    assert_eq!(code(service.prepare("k8s.io/6/extract-6 a", "", offer(&one)).await), Code::AlreadyExists);
    service.remove("k8s.io/4/one").await.unwrap();
    service.prepare("k8s.io/7/extract-7 a", "", offer(&one)).await.expect("it has to be unpacked again");
}

#[tokio::test]
async fn usage_of_a_lazy_snapshot_is_final_at_once() {
    let service = Service::start().await;
    let one = target("1");
    service.images.lazy(&one, |_| {});
    let first = skip(&service, "k8s.io/1/a", "", &one).await;
    // containerd asks once and keeps the answer until it is restarted.
    let usage = service.usage(&first).await.unwrap();
    assert_eq!((usage.size, usage.inodes), (123_456, 7));
    service.view("k8s.io/2/view", &first, Labels::new()).await.unwrap();
    assert_eq!(service.usage("k8s.io/2/view").await.unwrap().size, 0, "a view has nothing of its own");
}

#[tokio::test]
async fn a_layer_that_an_image_has_twice_is_given_back_once() {
    let service = Service::start().await;
    let (one, two) = (target("1"), target("2"));
    let layer = service.images.lazy(&one, |_| {});
    service.images.answer(&two, PrepareOutcome::Lazy { layer });
    let first = skip(&service, "k8s.io/1/a", "", &one).await;
    let second = skip(&service, "k8s.io/2/b", &first, &two).await;
    service.remove(&second).await.unwrap();
    assert!(service.images.released.lock().unwrap().is_empty());
    service.remove(&first).await.unwrap();
    assert_eq!(*service.images.released.lock().unwrap(), [layer]);
}
