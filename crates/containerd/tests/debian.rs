//! Against a real containerd, that of the machine's packages, started here with a root of its own.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics has found something")]

use std::collections::BTreeMap;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use futures::TryStreamExt;
use millstream_containerd::{
    BlobDescriptor, Containerd, ContainerdError, ContainerdOptions, Image, Prepared, SnapshotKind,
};
use millstream_oci::Digest;

const CONFIG: &str = "containerd.io/gc.ref.content.config";

/// Ends with the test.
struct Running {
    child: Child,
    containerd: Containerd,
    dir: tempfile::TempDir,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Running {
    async fn start() -> Option<Self> {
        if !Command::new("containerd").arg("--version").output().is_ok_and(|output| output.status.success())
            || !is_root()
        {
            assert!(std::env::var_os("MILLSTREAM_REQUIRE_ALL").is_none(), "containerd and root are needed");
            eprintln!("skipped: containerd and root are needed");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().display();
        let text = format!(
            "version = 2\nroot = \"{at}/root\"\nstate = \"{at}/state\"\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.snapshotter.v1.aufs\", \
             \"io.containerd.snapshotter.v1.btrfs\", \"io.containerd.snapshotter.v1.devmapper\", \
             \"io.containerd.snapshotter.v1.zfs\", \"io.containerd.internal.v1.opt\", \"io.containerd.grpc.v1.introspection\"]\n\
             [grpc]\n  address = \"{at}/c.sock\"\n"
        );
        std::fs::write(dir.path().join("config.toml"), text).unwrap();
        let child = Command::new("containerd")
            .arg("--config")
            .arg(dir.path().join("config.toml"))
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let containerd = Containerd::new(ContainerdOptions::new(dir.path().join("c.sock")));
        let running = Self { child, containerd, dir };
        let until = Instant::now() + Duration::from_secs(30);
        while let Err(error) = running.containerd.version().await {
            assert!(matches!(error, ContainerdError::Unreachable { .. }), "{error}");
            assert!(Instant::now() < until, "{error}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Some(running)
    }
}

fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").is_ok_and(|data| data.uid() == 0)
}

fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

#[tokio::test]
async fn who_does_not_answer_is_named_with_the_reason() {
    let containerd = Containerd::new(ContainerdOptions::new("/nonexistent/containerd.sock"));
    let text = containerd.version().await.unwrap_err().to_string();
    assert!(text.contains("/nonexistent/containerd.sock: No such file") && text.contains("hint:"), "{text}");
    assert!(containerd.namespace("a\nb").is_err());
    assert!(containerd.namespace("").is_err());
}

#[tokio::test]
async fn blobs_are_written_found_and_read_in_their_namespace() {
    let Some(running) = Running::start().await else { return };
    let space = running.containerd.namespace("one").unwrap().leased(Duration::from_secs(600)).await.unwrap();
    let bytes: Bytes = (0..5_000_000_u32).map(|n| n.to_le_bytes()[(n % 3) as usize]).collect();
    let digest = Digest::of(&bytes);

    // Begun, and broken off in the middle.
    let mut ingest = space.begin("layer-x", &digest, bytes.len() as u64).await.unwrap().unwrap();
    assert_eq!(ingest.offset(), 0);
    ingest.write(bytes.slice(..3_000_000)).await.unwrap();
    drop(ingest);
    assert!(matches!(space.blob_info(&digest).await, Err(ContainerdError::NotFound { .. })));

    // The next one goes on there, and cannot write too much.
    let mut ingest = space.begin("layer-x", &digest, bytes.len() as u64).await.unwrap().unwrap();
    assert_eq!(ingest.offset(), 3_000_000);
    ingest.write(bytes.slice(3_000_000..)).await.unwrap();
    assert!(ingest.write(Bytes::from_static(b"x")).await.is_err());
    ingest.commit(&labels(&[(CONFIG, "sha256:00"), ("b", "2")])).await.unwrap();
    assert!(space.begin("layer-x", &digest, bytes.len() as u64).await.unwrap().is_none());

    let info = space.blob_info(&digest).await.unwrap();
    assert_eq!((info.size, info.labels["b"].as_str()), (bytes.len() as u64, "2"));
    assert!(info.updated_at > SystemTime::now() - Duration::from_secs(60));
    space.put("again", &digest, bytes.clone(), &labels(&[("c", "3")])).await.unwrap();
    let small = Bytes::from_static(b"small");
    space.put("small", &Digest::of(&small), small.clone(), &BTreeMap::new()).await.unwrap();

    let found = space.blobs(&format!("labels.\"{CONFIG}\""), 10).await.unwrap();
    assert_eq!(found.iter().map(|info| info.digest).collect::<Vec<_>>(), [digest]);
    assert_eq!(found[0].labels.len(), 3, "labels add up: {:?}", found[0].labels);
    assert_eq!(space.blobs("", 1).await.unwrap().len(), 1);
    assert!(running.containerd.namespace("two").unwrap().blobs("", 10).await.unwrap().is_empty());
    assert!(running.containerd.namespaces().await.unwrap().contains(&"one".to_owned()));

    let pieces: Vec<Bytes> = space.read(&digest, 100, 1000).await.unwrap().try_collect().await.unwrap();
    assert_eq!(pieces.concat(), bytes[100..1100]);
    let rest: Vec<Bytes> = space.read(&digest, 4_999_000, 5000).await.unwrap().try_collect().await.unwrap();
    assert_eq!(rest.concat(), bytes[4_999_000..]);
    assert_eq!(space.read_all(&digest, bytes.len() as u64).await.unwrap(), bytes);
    assert!(matches!(space.read_all(&digest, 1000).await, Err(ContainerdError::TooLarge { limit: 1000, .. })));
    let missing = space.read_all(&Digest::of(b"missing"), 1000).await;
    assert!(matches!(missing, Err(ContainerdError::NotFound { .. })), "{missing:?}");
    space.release().await.unwrap();
}

#[tokio::test]
async fn bytes_with_another_digest_are_not_kept() {
    let Some(running) = Running::start().await else { return };
    let space = running.containerd.namespace("one").unwrap();
    let digest = Digest::of(b"right");
    let result = space.put("x", &digest, Bytes::from_static(b"wrong"), &BTreeMap::new()).await;
    assert!(matches!(result, Err(ContainerdError::Refused { .. })), "{result:?}");
    space.put("x", &digest, Bytes::from_static(b"right"), &BTreeMap::new()).await.unwrap();
    assert_eq!(space.read_all(&digest, 5).await.unwrap(), b"right");
}

#[tokio::test]
async fn images_are_made_and_moved() {
    let Some(running) = Running::start().await else { return };
    let space = running.containerd.namespace("one").unwrap();
    let target = |bytes: &[u8]| BlobDescriptor {
        media_type: "application/vnd.oci.image.manifest.v1+json".into(),
        digest: Digest::of(bytes),
        size: 5,
    };
    let name = "registry.example.com/team/app:1";
    assert!(matches!(space.image(name).await, Err(ContainerdError::NotFound { .. })));
    let first = Image { name: name.into(), target: target(b"1"), labels: labels(&[("a", "1")]) };
    space.put_image(&first).await.unwrap();
    let second = Image { name: name.into(), target: target(b"2"), labels: labels(&[("b", "2")]) };
    space.put_image(&second).await.unwrap();
    let found = space.image(name).await.unwrap();
    assert_eq!((found.target, found.labels), (target(b"2"), labels(&[("a", "1"), ("b", "2")])));
    let by_target = format!("target.digest=={}", Digest::of(b"2"));
    assert_eq!(space.images(&by_target).await.unwrap().len(), 1);
    assert!(space.images("name==other").await.unwrap().is_empty());
}

#[tokio::test]
async fn a_layer_is_unpacked_into_a_snapshot() {
    let Some(running) = Running::start().await else { return };
    let space = running.containerd.namespace("one").unwrap().leased(Duration::from_secs(600)).await.unwrap();
    let source = running.dir.path().join("file");
    std::fs::write(&source, "hello").unwrap();
    let tar = Command::new("tar").args(["-c", "-C"]).arg(running.dir.path()).arg("file").output().unwrap().stdout;
    let layer = BlobDescriptor {
        media_type: "application/vnd.oci.image.layer.v1.tar".into(),
        digest: Digest::of(&tar),
        size: tar.len() as u64,
    };
    space.put("layer", &layer.digest, tar.into(), &BTreeMap::new()).await.unwrap();

    let snapshots = space.snapshots("native");
    let name = layer.digest.to_string();
    let Prepared::Active(mounts) = snapshots.prepare("extract", "", &BTreeMap::new()).await.unwrap() else { panic!() };
    assert_eq!(snapshots.mounts("extract").await.unwrap(), mounts);
    assert_eq!(snapshots.stat("extract").await.unwrap(), SnapshotKind::Active);
    assert_eq!(space.apply(&layer, &mounts).await.unwrap().0, layer.digest);
    snapshots.commit("extract", &name, &BTreeMap::new()).await.unwrap();
    assert_eq!(snapshots.stat(&name).await.unwrap(), SnapshotKind::Committed);

    // Offered again, it is there.
    let offer = labels(&[("containerd.io/snapshot.ref", &name)]);
    assert_eq!(snapshots.prepare("extract", "", &offer).await.unwrap(), Prepared::Present);
    snapshots.remove(&name).await.unwrap();
    snapshots.remove(&name).await.unwrap();
    let error = space.snapshots("nonexistent").prepare("k", "", &BTreeMap::new()).await.unwrap_err().to_string();
    assert!(error.contains("nonexistent"), "{error}");
    space.release().await.unwrap();
}
