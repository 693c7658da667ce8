//! A running service, its client, and a stand-in for the node's lazy images that shows real directories.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use millstream_oci::Digest;
use millstream_snapshots::{
    LazyImages, Options, PrepareOutcome, PrepareRequest, SnapshotService, Snapshots, Usage, ViewFailure,
};
use millstream_wire::containerd::services::snapshots::v1 as api;
use millstream_wire::containerd::types::Mount;
use rustix::mount::{MountFlags, UnmountFlags};
use tempfile::TempDir;
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Code, Request, Status};

pub(crate) type Client = api::snapshots_client::SnapshotsClient<Channel>;
pub(crate) type Labels = HashMap<String, String>;

/// Answers by target, and directories by layer.
#[derive(Default)]
pub(crate) struct Images {
    pub(crate) outcomes: Mutex<HashMap<String, PrepareOutcome>>,
    /// Before a decision.
    pub(crate) delay: Mutex<Duration>,
    pub(crate) decided: AtomicUsize,
    pub(crate) answered: Mutex<Vec<PrepareOutcome>>,
    pub(crate) released: Mutex<Vec<Digest>>,
    directories: Mutex<HashMap<Digest, PathBuf>>,
    views: PathBuf,
}

impl Images {
    /// None yet; directories of views are made below `views`.
    pub(crate) fn in_directory(views: PathBuf) -> Self {
        Self { views, ..Self::default() }
    }

    /// Lets `target` be lazy, shown by a directory that `fill` fills.
    pub(crate) fn lazy(&self, target: &str, fill: impl FnOnce(&Path)) -> Digest {
        let layer = Digest::of(target.as_bytes());
        let mut directories = self.directories.lock().unwrap();
        let path = self.views.join(format!("layer-{}", directories.len()));
        fs::create_dir_all(&path).unwrap();
        fill(&path);
        directories.insert(layer, path);
        self.answer(target, PrepareOutcome::Lazy { layer });
        layer
    }

    pub(crate) fn answer(&self, target: &str, outcome: PrepareOutcome) {
        self.outcomes.lock().unwrap().insert(target.to_owned(), outcome);
    }

    pub(crate) fn decisions(&self) -> usize {
        self.decided.load(Ordering::SeqCst)
    }
}

#[tonic::async_trait]
impl LazyImages for Images {
    async fn decide(&self, request: &PrepareRequest) -> PrepareOutcome {
        self.decided.fetch_add(1, Ordering::SeqCst);
        let delay = *self.delay.lock().unwrap();
        tokio::time::sleep(delay).await;
        let outcome = self.outcomes.lock().unwrap().get(&request.target.to_string()).cloned();
        outcome.unwrap_or_else(|| PrepareOutcome::deferred("image.not-eligible", "unknown"))
    }

    fn answered(&self, _: &PrepareRequest, outcome: &PrepareOutcome) {
        self.answered.lock().unwrap().push(outcome.clone());
    }

    async fn view(&self, run: &[Digest], below: &[PathBuf]) -> Result<PathBuf, ViewFailure> {
        let names: Vec<_> = run.iter().map(|layer| layer.hex()[..8].to_owned()).collect();
        let view = self.views.join(format!("{}-{}", names.join("-"), below.len()));
        if !view.exists() {
            fs::create_dir_all(&view).unwrap();
            for layer in run {
                let directory = self.directories.lock().unwrap().get(layer).cloned();
                let directory = directory
                    .ok_or_else(|| ViewFailure { code: "layer.lost", message: format!("{layer} is not here") })?;
                let mut copy = Command::new("cp");
                assert!(copy.arg("-a").arg(directory.join(".")).arg(&view).status().unwrap().success());
            }
        }
        Ok(view)
    }

    fn released(&self, layers: &[Digest]) {
        self.released.lock().unwrap().extend(layers);
    }

    fn usage(&self, _: &Digest) -> Usage {
        Usage { bytes: 123_456, inodes: 7 }
    }
}

/// A service in a directory of its own.
pub(crate) struct Service {
    pub(crate) images: Arc<Images>,
    pub(crate) snapshots: Snapshots,
    pub(crate) client: Client,
    pub(crate) temp: Arc<TempDir>,
    server: JoinHandle<()>,
}

impl Service {
    pub(crate) async fn start() -> Self {
        let temp = Arc::new(tempfile::tempdir().unwrap());
        let images = Arc::new(Images::in_directory(temp.path().join("root/v")));
        Self::start_in(temp, images, Options::default()).await
    }

    pub(crate) async fn start_in(temp: Arc<TempDir>, images: Arc<Images>, options: Options) -> Self {
        let db = Arc::new(redb::Database::create(temp.path().join("db")).unwrap());
        let lazy: Arc<dyn LazyImages> = images.clone();
        let snapshots = Snapshots::open(&temp.path().join("root"), db, lazy, options).unwrap();
        let socket = temp.path().join("socket");
        let _ = fs::remove_file(&socket);
        let listener = UnixListenerStream::new(UnixListener::bind(&socket).unwrap());
        let service = api::snapshots_server::SnapshotsServer::new(SnapshotService::new(snapshots.clone()));
        let server = tokio::spawn(async move {
            Server::builder().add_service(service).serve_with_incoming(listener).await.unwrap();
        });
        let connect = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let channel = Endpoint::from_static("http://unix").connect_with_connector(connect).await.unwrap();
        Self { images, snapshots, client: Client::new(channel), temp, server }
    }

    /// Ends the service as a crash would, and starts it on what is left.
    pub(crate) async fn restart(self, between: impl FnOnce(&Path)) -> Self {
        let (images, temp) = (Arc::clone(&self.images), Arc::clone(&self.temp));
        drop(self);
        // Tasks of the old service hold the database for a moment.
        eventually(|| redb::Database::create(temp.path().join("db")).is_ok()).await;
        between(&temp.path().join("root"));
        Self::start_in(temp, images, Options::default()).await
    }

    /// A fresh, empty directory.
    pub(crate) fn directory(&self, name: &str) -> PathBuf {
        let path = self.temp.path().join("work").join(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    pub(crate) async fn prepare_as(
        &self,
        namespace: &'static str,
        key: &str,
        parent: &str,
        labels: Labels,
    ) -> Result<Vec<Mount>, Status> {
        let message =
            api::PrepareSnapshotRequest { key: key.into(), parent: parent.into(), labels, ..Default::default() };
        let mut request = Request::new(message);
        request.metadata_mut().insert("containerd-namespace", namespace.parse().unwrap());
        Ok(self.client.clone().prepare(request).await?.into_inner().mounts)
    }

    pub(crate) async fn prepare(&self, key: &str, parent: &str, labels: Labels) -> Result<Vec<Mount>, Status> {
        self.prepare_as("k8s.io", key, parent, labels).await
    }

    pub(crate) async fn view(&self, key: &str, parent: &str, labels: Labels) -> Result<Vec<Mount>, Status> {
        let request = api::ViewSnapshotRequest { key: key.into(), parent: parent.into(), labels, ..Default::default() };
        Ok(self.client.clone().view(request).await?.into_inner().mounts)
    }

    pub(crate) async fn mounts(&self, key: &str) -> Result<Vec<Mount>, Status> {
        let request = api::MountsRequest { key: key.into(), ..Default::default() };
        Ok(self.client.clone().mounts(request).await?.into_inner().mounts)
    }

    pub(crate) async fn commit(&self, name: &str, key: &str, labels: Labels) -> Result<(), Status> {
        let request = api::CommitSnapshotRequest { name: name.into(), key: key.into(), labels, ..Default::default() };
        self.client.clone().commit(request).await.map(drop)
    }

    pub(crate) async fn remove(&self, key: &str) -> Result<(), Status> {
        let request = api::RemoveSnapshotRequest { key: key.into(), ..Default::default() };
        self.client.clone().remove(request).await.map(drop)
    }

    pub(crate) async fn stat(&self, key: &str) -> Result<api::Info, Status> {
        let request = api::StatSnapshotRequest { key: key.into(), ..Default::default() };
        Ok(self.client.clone().stat(request).await?.into_inner().info.unwrap())
    }

    pub(crate) async fn update(&self, info: api::Info, paths: &[&str]) -> Result<api::Info, Status> {
        let mask = prost_types::FieldMask { paths: paths.iter().map(|path| (*path).to_owned()).collect() };
        let request = api::UpdateSnapshotRequest { info: Some(info), update_mask: Some(mask), ..Default::default() };
        Ok(self.client.clone().update(request).await?.into_inner().info.unwrap())
    }

    pub(crate) async fn usage(&self, key: &str) -> Result<api::UsageResponse, Status> {
        let request = api::UsageRequest { key: key.into(), ..Default::default() };
        Ok(self.client.clone().usage(request).await?.into_inner())
    }

    pub(crate) async fn cleanup(&self) {
        self.client.clone().cleanup(api::CleanupRequest::default()).await.unwrap();
    }

    pub(crate) async fn list(&self, filters: &[&str]) -> Result<Vec<api::Info>, Status> {
        let filters = filters.iter().map(|filter| (*filter).to_owned()).collect();
        let request = api::ListSnapshotsRequest { filters, ..Default::default() };
        let mut stream = self.client.clone().list(request).await?.into_inner();
        let mut all = Vec::new();
        while let Some(message) = stream.message().await? {
            assert!(message.info.len() <= 100, "a batch of {}", message.info.len());
            all.extend(message.info);
        }
        Ok(all)
    }

    /// Names that a list finds, sorted.
    pub(crate) async fn names(&self, filters: &[&str]) -> Vec<String> {
        let mut names: Vec<_> = self.list(filters).await.unwrap().into_iter().map(|info| info.name).collect();
        names.sort();
        names
    }

    /// An empty committed snapshot.
    pub(crate) async fn committed(&self, name: &str, parent: &str) {
        let key = format!("{name}-key");
        self.prepare(&key, parent, Labels::new()).await.unwrap();
        self.commit(name, &key, Labels::new()).await.unwrap();
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.server.abort();
    }
}

pub(crate) fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

pub(crate) fn code<T: std::fmt::Debug>(result: Result<T, Status>) -> Code {
    result.expect_err("this should have failed").code()
}

/// Waits until `done`, for ten seconds at most.
pub(crate) async fn eventually(mut done: impl FnMut() -> bool) {
    for _ in 0..1000 {
        if done() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("it never happened");
}

/// Whether mounts can be made; says so where not.
pub(crate) fn can_mount() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: mounts need root");
    }
    root
}

/// A mount made as containerd's client makes it, unmounted when dropped.
pub(crate) struct Mounted(pub(crate) PathBuf);

impl Mounted {
    pub(crate) fn new(mounts: &[Mount], target: PathBuf) -> Self {
        let [mount] = mounts else { panic!("one mount, not {mounts:?}") };
        match mount.r#type.as_str() {
            "bind" => {
                rustix::mount::mount_bind_recursive(mount.source.as_str(), &target).unwrap();
                if mount.options.iter().any(|option| option == "ro") {
                    rustix::mount::mount_remount(&target, MountFlags::BIND | MountFlags::RDONLY, "").unwrap();
                }
            }
            "overlay" => overlay(&mount.options, &target),
            other => panic!("unexpected mount type {other}"),
        }
        Self(target)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.0, UnmountFlags::DETACH).unwrap();
    }
}

/// containerd makes long lower directory lists relative to their common parent, since options share one page.
fn overlay(options: &[String], target: &Path) {
    let mut command = Command::new("mount");
    // The way of mount(2), not fsopen(2), whose single options are shorter still.
    command.env("LIBMOUNT_FORCE_MOUNT2", "always").args(["-i", "-t", "overlay", "overlay", "-o"]);
    if options.iter().map(String::len).sum::<usize>() < 4096 - 512 {
        command.arg(options.join(","));
    } else {
        let (lowers, others): (Vec<_>, Vec<_>) = options.iter().partition(|option| option.starts_with("lowerdir="));
        let lowers: Vec<&str> = lowers[0]["lowerdir=".len()..].split(':').collect();
        let common =
            Path::new(lowers[0]).ancestors().find(|dir| lowers.iter().all(|lower| Path::new(lower).starts_with(dir)));
        let common = common.unwrap();
        let short: Vec<_> =
            lowers.iter().map(|lower| Path::new(lower).strip_prefix(common).unwrap().to_str().unwrap()).collect();
        let others: Vec<_> = others.into_iter().cloned().collect();
        let data = format!("{},lowerdir={}", others.join(","), short.join(":"));
        assert!(data.len() < 4096, "{} bytes of options", data.len());
        command.current_dir(common).arg(data);
    }
    let output = command.arg(target).output().unwrap();
    assert!(output.status.success(), "{options:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Everything below a directory: path to kind, mode, owner and content.
pub(crate) fn tree(root: &Path) -> BTreeMap<PathBuf, (u32, u32, u32, Vec<u8>)> {
    let mut found = BTreeMap::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let metadata = fs::symlink_metadata(&path).unwrap();
            assert!(!metadata.file_type().is_char_device(), "a whiteout shows: {}", path.display());
            let content = if metadata.is_dir() {
                directories.push(path.clone());
                Vec::new()
            } else if metadata.is_symlink() {
                fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes()
            } else {
                fs::read(&path).unwrap()
            };
            let relative = path.strip_prefix(root).unwrap().to_owned();
            found.insert(relative, (metadata.mode(), metadata.uid(), metadata.gid(), content));
        }
    }
    found
}
