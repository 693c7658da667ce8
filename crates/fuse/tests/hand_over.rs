//! A real mount whose server is killed while a read waits, and whose next server answers that read.
//!
//! The servers are processes of their own, as in the product: this test binary started again with descriptors passed.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

use std::fs;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use millstream_fuse::adapter::{Later, MAX_READ, ReadRequest};
use millstream_fuse::taken::BUFFER;
use millstream_fuse::{Adapter, Connection, Content, ContentError, Journal, Operation, Session};
use millstream_layerfs::{LayerFs, NodeId, View, ViewLayer, build_view};
use millstream_sys::fuse_device::{self, message_pair, write_message};
use millstream_sys::process::{spawn_with, take_passed};
use millstream_toc::build::{BuildOptions, Compression, build};
use millstream_toc::{DataRange, Toc};

/// As millstreamd has it.
#[global_allocator]
static ALLOCATOR: millstream_sys::lent::Lender = millstream_sys::lent::Lender;

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
    /// Whether a read has taken servers along; then none is answered any more.
    set_aside: AtomicBool,
}

impl Content for Half {
    fn read_local(&self, request: &ReadRequest) -> Result<Option<Vec<u8>>, ContentError> {
        Ok((request.file.len() < 1000).then(|| b"t hand"[..6].to_vec()))
    }

    fn read_remote(&self, request: ReadRequest) -> Later<Result<Vec<u8>, ContentError>> {
        let (answers, set_aside) = (self.answers, self.set_aside.load(Ordering::Relaxed));
        Box::pin(async move {
            if set_aside {
                return Err(ContentError::Unavailable);
            }
            if !answers {
                std::future::pending::<()>().await;
            }
            let DataRange { start, end } = request.wanted;
            Ok((start - request.file.start..end - request.file.start).map(byte_at).collect())
        })
    }

    fn took_workers_along(&self, _node: NodeId, operation: Operation) {
        assert_eq!(operation, Operation::Read);
        // The kernel had read ahead; the page that was wanted it asks for once more.
        self.set_aside.store(true, Ordering::Relaxed);
    }
}

/// How a server is to be.
fn role() -> Option<String> {
    std::env::var(ROLE).ok()
}

/// Not a test of its own: the servers of the test below.
#[test]
fn server_process() {
    let Some(role) = role() else { return };
    let mut passed = take_passed(3).unwrap();
    let (journal, control, device) = (passed.pop().unwrap(), passed.pop().unwrap(), passed.pop().unwrap());
    let journal = Arc::new(Journal::open(&journal).unwrap());
    let init = receive(&control);
    let answer = Some(receive(&control)).filter(|answer| answer != b"first");
    match role.as_str() {
        // The kernel wants room for the largest write that was agreed on.
        "orphans" => return take_and_note_nothing(&control, &device, vec![0; 2 * MAX_READ as usize]),
        "takes" => {
            journal.keep_what_is_taken().unwrap();
            return take_and_note_nothing(&control, &device, vec![0; BUFFER]);
        }
        _ => {}
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let content = Arc::new(Half { answers: role == "answers", set_aside: AtomicBool::new(false) });
    let adapter = Adapter::new(layer_fs(), content, runtime.handle().clone(), Some(Arc::clone(&journal)));
    let again = answer.is_some();
    let connection = Connection { device, init, answer };
    let session =
        Session::start(adapter, connection, Some(&journal), |answer| write_message(control.as_fd(), answer)).unwrap();
    if again {
        write_message(control.as_fd(), b"took over").unwrap();
    }
    session.wait().unwrap();
}

/// A server at the moment between taking a request and noting it. Its end comes from outside.
fn take_and_note_nothing(control: &OwnedFd, device: &OwnedFd, mut buffer: Vec<u8>) {
    write_message(control.as_fd(), b"took over").unwrap();
    let len = fs::File::from(device.try_clone().unwrap()).read(&mut buffer).unwrap();
    write_message(control.as_fd(), &buffer[..len.min(1000)]).unwrap();
    receive(control);
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
    shared: OwnedFd,
    journal: Journal,
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = fuse_device::unmount(self.path.path());
    }
}

fn mount() -> Mount {
    let path = tempfile::tempdir().unwrap();
    let mounted = fuse_device::mount("millstream-test", path.path(), MAX_READ).unwrap();
    let (shared, journal) = Journal::create().unwrap();
    Mount { path, mounted, shared, journal }
}

struct Server(Child, OwnedFd);

impl Server {
    /// Kills it; `by_itself`: as far as the journal is told, it has died of what it was doing.
    fn die(mut self, mount: &Mount, by_itself: bool) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
        mount.journal.died(self.0.id(), by_itself);
    }
}

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
    let passed = [mount.mounted.device.as_fd(), theirs.as_fd(), mount.shared.as_fd()];
    let server = Server(spawn_with(command, &passed).unwrap(), ours);
    drop(theirs);
    write_message(server.1.as_fd(), &mount.mounted.init).unwrap();
    write_message(server.1.as_fd(), answer.unwrap_or(b"first")).unwrap();
    let answer = receive(&server.1);
    assert!(!answer.is_empty(), "the server did not start");
    if answer != b"took over" {
        write_message(mount.mounted.device.as_fd(), &answer).unwrap();
    }
    (server, answer)
}

/// Whether a thread waits in the kernel is asked of the whole process, so one test after the other. None: not on this machine.
fn turn() -> Option<MutexGuard<'static, ()>> {
    static TURN: Mutex<()> = Mutex::new(());
    if !rustix::process::geteuid().is_root() || !Path::new("/dev/fuse").exists() {
        // Past the capture of the test runner, so that it is seen and counted.
        std::io::Write::write_all(&mut std::io::stderr(), b"skipped: needs root and /dev/fuse\n").ok();
        assert!(std::env::var_os("MILLSTREAM_REQUIRE_ALL").is_none(), "a required tier was skipped");
        return None;
    }
    Some(TURN.lock().unwrap_or_else(PoisonError::into_inner))
}

#[test]
fn a_read_that_waits_survives_the_death_of_its_server() {
    let Some(_turn) = turn() else { return };
    let mount = mount();
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

/// Lets the kernel learn that files need neither opening nor flushing. Until then whoever closes one waits for a server, and this
/// process does when it starts the next server, whose process begins as a copy of it.
fn open_and_close(dir: &Path) {
    drop(fs::File::open(dir.join("slow")).unwrap());
}

fn wait_for_a_waiting_reader() {
    // For some time on end: what comes before the read is answered in a moment.
    let (mut waited, deadline) = (0, Instant::now() + Duration::from_secs(10));
    while waited < 20 && Instant::now() < deadline {
        waited = if waits_in_the_kernel() { waited + 1 } else { 0 };
        #[allow(clippy::disallowed_methods, reason = "the kernel sends no event")]
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(waits_in_the_kernel());
}

/// As on a kernel before 6.9: this one would send the requests again, but nobody asks it to.
#[test]
fn what_waits_is_answered_from_the_journal_where_the_kernel_does_not_send_it_again() {
    let Some(_turn) = turn() else { return };
    let mut mount = mount();
    mount.mounted.init[56] &= !(1 << 7);
    let dir = mount.path.path().join(VIEW.to_string()).join("dir");
    let (first, answer) = start(&mount, "stalls", None);
    assert_eq!(fs::read(dir.join("quick")).unwrap(), b"t hand");
    let slow = dir.join("slow");
    let reader = std::thread::spawn(move || fs::read(slow).unwrap());
    wait_for_a_waiting_reader();
    first.die(&mount, true);
    let (second, _) = start(&mount, "stalls", Some(&answer));
    second.die(&mount, false);
    let (_third, _) = start(&mount, "answers", Some(&answer));
    let expected: Vec<u8> = (0..100_000).map(byte_at).collect();
    assert!(reader.join().unwrap() == expected);
    let names: Vec<_> = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["quick", "slow"]);
}

/// What `work` comes to when a server on a kernel before 6.9 dies between taking the first request of it and noting that.
/// Another read waits all the while, which was noted and has to get its bytes. The `role` of that server: `takes` as it is, into
/// memory that outlives it; `orphans` as under a supervisor that has no such memory.
fn orphaned<P: Send + 'static, T: Send + 'static>(
    role: &str,
    prepare: impl FnOnce(&Path) -> P,
    opcode: Operation,
    work: impl FnOnce(P) -> T + Send + 'static,
) -> Option<T> {
    let _turn = turn()?;
    let mut mount = mount();
    mount.mounted.init[56] &= !(1 << 7);
    let dir = mount.path.path().join(VIEW.to_string()).join("dir");
    let (first, answer) = start(&mount, "stalls", None);
    open_and_close(&dir);
    let prepared = prepare(&dir);
    let slow = dir.join("slow");
    let reader = std::thread::spawn(move || fs::read(slow).unwrap());
    wait_for_a_waiting_reader();
    first.die(&mount, true);

    let (second, _) = start(&mount, role, Some(&answer));
    let (done, result) = mpsc::channel();
    std::thread::spawn(move || done.send(work(prepared)));
    let taken = receive(&second.1);
    assert_eq!(taken[4..8], (opcode as u32).to_le_bytes(), "another request than the one that is meant");
    second.die(&mount, false);

    let (_third, _) = start(&mount, "answers", Some(&answer));
    // Else it waits for ever.
    let result = result.recv_timeout(Duration::from_secs(10)).unwrap();
    let expected: Vec<u8> = (0..100_000).map(byte_at).collect();
    assert!(reader.join().unwrap() == expected);
    Some(result)
}

/// From the directory on: what leads there is looked up anew each time.
fn read_quick(dir: fs::File) -> std::io::Result<Vec<u8>> {
    let file = rustix::fs::openat(dir, "quick", rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty())?;
    read_all(file.into())
}

fn read_all(mut file: fs::File) -> std::io::Result<Vec<u8>> {
    let mut content = Vec::new();
    file.read_to_end(&mut content).map(|_| content)
}

#[test]
fn a_look_up_that_was_taken_and_not_noted_is_tried_again_by_the_kernel() {
    let prepare = |dir: &Path| fs::File::open(dir).unwrap();
    let Some(read) = orphaned("orphans", prepare, Operation::LookUp, read_quick) else { return };
    assert_eq!(read.unwrap(), b"t hand");
}

/// Of a directory: the kernel does not ask for files.
#[test]
fn an_open_that_was_taken_and_not_noted_is_tried_again_by_the_kernel() {
    // From the directory on: what leads there is looked up anew each time.
    let prepare = |dir: &Path| fs::File::open(dir).unwrap();
    let open = |dir: fs::File| {
        rustix::fs::openat(dir, ".", rustix::fs::OFlags::DIRECTORY, rustix::fs::Mode::empty()).map(|_| ())
    };
    let Some(opened) = orphaned("orphans", prepare, Operation::OpenDir, open) else { return };
    assert_eq!(opened, Ok(()));
}

#[test]
fn a_read_that_was_taken_and_not_noted_is_tried_again_by_the_kernel() {
    let prepare = |dir: &Path| fs::File::open(dir.join("quick")).unwrap();
    let Some(read) = orphaned("orphans", prepare, Operation::Read, read_all) else { return };
    assert_eq!(read.unwrap(), b"t hand");
}

fn open_direct(dir: &Path) -> fs::File {
    let direct = rustix::fs::OFlags::DIRECT.bits().try_into().unwrap();
    fs::File::options().read(true).custom_flags(direct).open(dir.join("quick")).unwrap()
}

/// Nothing stands between it and the program that could try again.
#[test]
fn a_read_past_the_page_cache_that_was_taken_and_not_noted_ends_with_an_error() {
    let Some(read) = orphaned("orphans", open_direct, Operation::Read, read_all) else { return };
    assert_eq!(read.unwrap_err().raw_os_error(), Some(rustix::io::Errno::STALE.raw_os_error()));
}

#[test]
fn a_read_past_the_page_cache_is_found_in_the_buffer_of_who_took_it() {
    let Some(read) = orphaned("takes", open_direct, Operation::Read, read_all) else { return };
    assert_eq!(read.unwrap(), b"t hand");
}

#[test]
fn a_listing_is_found_in_the_buffer_of_who_took_it() {
    let prepare = |dir: &Path| {
        // Opened, and nothing read yet.
        fs::read_dir(dir).unwrap()
    };
    let list = |listing: fs::ReadDir| -> Vec<_> { listing.map(|entry| entry.unwrap().file_name()).collect() };
    let Some(names) = orphaned("takes", prepare, Operation::ReadDirPlus, list) else { return };
    assert_eq!(names, ["quick", "slow"]);
}

#[test]
fn a_name_is_found_in_the_buffer_of_who_took_it() {
    let prepare = |dir: &Path| fs::File::open(dir).unwrap();
    let find = |dir: fs::File| rustix::fs::statat(dir, "none", rustix::fs::AtFlags::empty()).map(|_| ());
    let Some(found) = orphaned("takes", prepare, Operation::LookUp, find) else { return };
    assert_eq!(found, Err(rustix::io::Errno::NOENT));
}

/// What the tests above stand on: that fuser reads into a buffer of the size that is looked for.
#[test]
fn the_threads_of_a_server_read_into_memory_that_outlives_it_on_old_kernels() {
    let Some(_turn) = turn() else { return };
    let mut mount = mount();
    mount.mounted.init[56] &= !(1 << 7);
    let dir = mount.path.path().join(VIEW.to_string()).join("dir");
    let (first, _) = start(&mount, "answers", None);
    open_and_close(&dir);
    // Not closed, so that no later request takes the place of the read.
    let file = open_direct(&dir);
    assert_eq!((&file).read(&mut [0; 4096]).unwrap(), 6);
    first.die(&mount, false);
    let taken = mount.journal.taken();
    let read = taken.iter().find(|noted| noted.opcode == Operation::Read as u32).unwrap();
    assert_eq!((read.offset, read.unique % 2), (0, 0));
    assert!(read.size >= 4096);
}

fn a_poison_is_refused(sends_again: bool) {
    let Some(_turn) = turn() else { return };
    let mut mount = mount();
    if !sends_again {
        mount.mounted.init[56] &= !(1 << 7);
    }
    let dir = mount.path.path().join(VIEW.to_string()).join("dir");
    let (first, answer) = start(&mount, "stalls", None);
    open_and_close(&dir);
    let slow = dir.join("slow");
    let reader = std::thread::spawn(move || fs::read(slow));
    wait_for_a_waiting_reader();
    first.die(&mount, true);
    let (second, _) = start(&mount, "stalls", Some(&answer));
    // It has taken the read up when it answers this one, which came later; on an old kernel, soon.
    assert_eq!(fs::read(dir.join("quick")).unwrap(), b"t hand");
    #[allow(clippy::disallowed_methods, reason = "nothing tells when the answers of the journal are begun")]
    std::thread::sleep(Duration::from_millis(300));
    assert!(!reader.is_finished());
    second.die(&mount, true);
    let (_third, _) = start(&mount, "answers", Some(&answer));
    assert_eq!(reader.join().unwrap().unwrap_err().raw_os_error(), Some(5), "EIO");
    // The rest goes on.
    assert_eq!(fs::read(dir.join("quick")).unwrap(), b"t hand");
}

#[test]
fn a_request_that_took_two_servers_along_is_refused_by_the_third() {
    a_poison_is_refused(true);
}

#[test]
fn a_request_that_took_two_servers_along_is_refused_by_the_third_on_old_kernels() {
    a_poison_is_refused(false);
}

/// Whether a thread of this process waits for an answer to a FUSE request.
fn waits_in_the_kernel() -> bool {
    fs::read_dir("/proc/self/task").unwrap().flatten().any(|task| {
        let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        let state = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
        state.starts_with('D')
    })
}
