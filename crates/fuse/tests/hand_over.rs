//! A real mount whose server is killed while a read waits, and whose next server answers that read.
//!
//! The servers are processes of their own, as in the product: this test binary started again with descriptors passed.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

use std::fs;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::{Duration, Instant};

use millstream_fuse::adapter::{Later, MAX_READ, ReadRequest};
use millstream_fuse::{Adapter, Connection, Content, ContentError, Session};
use millstream_layerfs::{LayerFs, View, ViewLayer, build_view};
use millstream_sys::fuse_device::{self, message_pair, write_message};
use millstream_sys::process::{spawn_with, take_passed};
use millstream_toc::build::{BuildOptions, Compression, build};
use millstream_toc::{DataRange, Toc};

const ROLE: &str = "MILLSTREAM_TEST_SERVER";
const VIEW: u32 = 1;
const LAYER: u32 = 1;

fn byte_at(offset: u64) -> u8 {
    u8::try_from(offset * 7 % 251).unwrap()
}

fn layer_fs() -> Arc<LayerFs> {
    let content: Vec<u8> = (0..100_000).map(byte_at).collect();
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_mode(0o644);
    header.set_size(content.len() as u64);
    tar.append_data(&mut header, "dir/slow", content.as_slice()).unwrap();
    header.set_size(6);
    tar.append_data(&mut header, "dir/quick", b"at hand".get(1..).unwrap()).unwrap();
    let tar = tar.into_inner().unwrap();
    let toc = build(tar.as_slice(), &BuildOptions::new(Compression::Plain), &mut ()).unwrap().toc;
    let layers = vec![ViewLayer { number: LAYER, toc: Arc::new(Toc::open(toc).unwrap()) }];
    let view = build_view(&layers, None).unwrap();
    let fs = LayerFs::new();
    fs.add(View::open(VIEW, view, layers).unwrap());
    Arc::new(fs)
}

/// Gives small files at once; large ones only if it is the server that is meant to.
struct Half {
    answers: bool,
}

impl Content for Half {
    fn read_local(&self, request: &ReadRequest) -> Result<Option<Vec<u8>>, ContentError> {
        Ok((request.file.len() < 1000).then(|| b"t hand"[..6].to_vec()))
    }

    fn read_remote(&self, request: ReadRequest) -> Later<Result<Vec<u8>, ContentError>> {
        let answers = self.answers;
        Box::pin(async move {
            if !answers {
                std::future::pending::<()>().await;
            }
            let DataRange { start, end } = request.wanted;
            Ok((start - request.file.start..end - request.file.start).map(byte_at).collect())
        })
    }
}

/// Not a test of its own: the servers of the test below.
#[test]
fn server_process() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let mut passed = take_passed(2).unwrap();
    let (control, device) = (passed.pop().unwrap(), passed.pop().unwrap());
    let init = receive(&control);
    let answer = Some(receive(&control)).filter(|answer| answer != b"first");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let content = Arc::new(Half { answers: role == "answers" });
    let adapter = Adapter::new(layer_fs(), content, runtime.handle().clone());
    let again = answer.is_some();
    let connection = Connection { device, init, answer };
    let session = Session::start(adapter, connection, |answer| write_message(control.as_fd(), answer)).unwrap();
    if again {
        write_message(control.as_fd(), b"took over").unwrap();
    }
    session.wait().unwrap();
}

fn receive(socket: &OwnedFd) -> Vec<u8> {
    let mut buffer = vec![0; 65536];
    let len = fs::File::from(socket.try_clone().unwrap()).read(&mut buffer).unwrap();
    buffer.truncate(len);
    buffer
}

struct Mount {
    path: tempfile::TempDir,
    mounted: fuse_device::Mounted,
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = fuse_device::unmount(self.path.path());
    }
}

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(mount: &Mount, role: &str, answer: Option<&[u8]>) -> (Server, Vec<u8>) {
    let (ours, theirs) = message_pair().unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "server_process", "--test-threads=1"]).env(ROLE, role);
    let server = Server(spawn_with(command, &[mount.mounted.device.as_fd(), theirs.as_fd()]).unwrap());
    drop(theirs);
    write_message(ours.as_fd(), &mount.mounted.init).unwrap();
    write_message(ours.as_fd(), answer.unwrap_or(b"first")).unwrap();
    let answer = receive(&ours);
    assert!(!answer.is_empty(), "the server did not start");
    if answer != b"took over" {
        write_message(mount.mounted.device.as_fd(), &answer).unwrap();
    }
    (server, answer)
}

#[test]
fn a_read_that_waits_survives_the_death_of_its_server() {
    if !rustix::process::geteuid().is_root() || !Path::new("/dev/fuse").exists() {
        // Past the capture of the test runner, so that it is seen and counted.
        std::io::Write::write_all(&mut std::io::stderr(), b"skipped: needs root and /dev/fuse\n").ok();
        assert!(std::env::var_os("MILLSTREAM_REQUIRE_ALL").is_none(), "a required tier was skipped");
        return;
    }
    let path = tempfile::tempdir().unwrap();
    let mounted = fuse_device::mount("millstream-test", path.path(), MAX_READ).unwrap();
    let mount = Mount { path, mounted };
    let dir = mount.path.path().join(VIEW.to_string()).join("dir");

    let (first, answer) = start(&mount, "stalls", None);
    assert_eq!(fs::read(dir.join("quick")).unwrap(), b"t hand");
    assert_eq!(fs::read(dir.join("none")).unwrap_err().kind(), std::io::ErrorKind::NotFound);
    let slow = dir.join("slow");
    let inode = std::os::unix::fs::MetadataExt::ino(&fs::metadata(&slow).unwrap());
    let reader = std::thread::spawn({
        let slow = slow.clone();
        move || fs::read(slow).unwrap()
    });
    let deadline = Instant::now() + Duration::from_secs(10);
    while !waits_in_the_kernel() && Instant::now() < deadline {
        std::thread::yield_now();
    }
    assert!(!reader.is_finished());
    drop(first);
    assert!(!reader.is_finished(), "a dead server is a pause, not an error");

    let (_second, took_over) = start(&mount, "answers", Some(&answer));
    assert_eq!(took_over, b"took over");
    let expected: Vec<u8> = (0..100_000).map(byte_at).collect();
    assert!(reader.join().unwrap() == expected, "the read gets its bytes from the second server");
    assert_eq!(std::os::unix::fs::MetadataExt::ino(&fs::metadata(&slow).unwrap()), inode);
    let names: Vec<_> = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["quick", "slow"]);
}

/// Whether a thread of this process waits for an answer to a FUSE request.
fn waits_in_the_kernel() -> bool {
    fs::read_dir("/proc/self/task").unwrap().flatten().any(|task| {
        let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        let state = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
        state.starts_with('D')
    })
}
