//! Serving a FUSE connection that another process opened and mounted, and that may have been served before.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::thread::JoinHandle;

use fuser::{Config, Filesystem, INodeNo, Notifier, SessionACL};
use millstream_layerfs::NodeId;
use millstream_sys::fuse_device;
use tracing::{info, warn};

use crate::journal::Journal;
use crate::{orphans, replay};

/// Threads that take requests from the kernel. More did not help on two cores; reads that wait do not hold a thread.
pub(crate) const THREADS: usize = 4;
/// Bytes of the longest answer to INIT (`struct fuse_out_header` and `struct fuse_init_out`: 80 today).
const MAX_INIT_ANSWER: usize = 4096;

/// A connection as the process that owns it hands it on.
#[derive(Debug)]
pub struct Connection {
    /// The device; its owner keeps a descriptor of its own.
    pub device: OwnedFd,
    /// The INIT request of the kernel, header included.
    pub init: Vec<u8>,
    /// What the first server answered to it; `None` if this is the first one.
    pub answer: Option<Vec<u8>>,
}

/// Makes the kernel forget bytes of files that it keeps. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Invalidator(Notifier);

impl Invalidator {
    /// Takes all bytes of the file out of the page cache; mapped pages are read anew when they are next touched. May wait for
    /// reads of the file that are under way, so not on a thread that answers them.
    ///
    /// # Errors
    /// Those of the device. A file of which the kernel keeps nothing is fine.
    pub fn forget(&self, file: NodeId) -> io::Result<()> {
        // From the beginning, and to the end.
        match self.0.inval_inode(INodeNo(file.raw()), 0, 0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }
}

/// A connection that is being served.
#[derive(Debug)]
pub struct Session {
    invalidator: Invalidator,
    thread: JoinHandle<io::Result<()>>,
}

impl Session {
    /// Serves `connection` with `fs` on threads of its own until it is unmounted or the process ends.
    ///
    /// `answer_init` gets the answer to the kernel's INIT if nobody gave one yet. It is for the owner of the connection, who
    /// writes it to the device and keeps it: were it written here, a death right after it would leave an answered connection
    /// that looks new. A later server is told the same INIT, answers nobody, and asks the kernel to send again what its
    /// predecessor left unanswered; where the kernel cannot (before 6.9), that is answered from `journal`, and what is not in it
    /// with an error.
    ///
    /// # Errors
    /// When the handshake fails, the device is gone, or `answer_init` fails.
    pub fn start<F: Filesystem + Clone>(
        fs: F,
        connection: Connection,
        journal: Option<&Journal>,
        answer_init: impl FnOnce(&[u8]) -> io::Result<()>,
    ) -> io::Result<Self> {
        let (for_fuser, ours) = fuse_device::message_pair()?;
        fuse_device::write_message(ours.as_fd(), &connection.init)?;
        let mut config = Config::default();
        config.acl = SessionACL::All;
        config.n_threads = Some(THREADS);
        config.clone_fd = false;
        let fs_again = fs.clone();
        let session = fuser::Session::from_fd(fs, for_fuser, SessionACL::All, config)?;
        let answer = read_answer(&ours)?;
        fuse_device::replace(session.as_fd(), connection.device.as_fd())?;
        match &connection.answer {
            None => answer_init(&answer)?,
            Some(first) => {
                if *first != answer {
                    // The kernel goes by the first answer; what differs was not asked of it.
                    warn!(
                        "this version would negotiate the FUSE connection differently; features change at the next mount"
                    );
                }
                // Before the first request is taken: from then on there are new ones in it.
                let left = journal.map_or_else(Vec::new, Journal::left);
                if replay::sends_again(&connection.init) {
                    fuse_device::resend(&connection.device)?;
                } else {
                    if let Some(journal) = journal {
                        orphans::give_up(&connection.device, journal, &left)?;
                    }
                    replay::answer(fs_again, &connection.init, connection.device.try_clone()?, left)?;
                }
                info!("took over the FUSE connection");
            }
        }
        if let Some(journal) = journal.filter(|_| !replay::sends_again(&connection.init)) {
            journal.keep_what_is_taken()?;
        }
        let invalidator = Invalidator(session.notifier());
        let thread = std::thread::Builder::new().name("fuse".into()).spawn(move || session.run())?;
        Ok(Self { invalidator, thread })
    }

    /// What makes the kernel forget.
    #[must_use]
    pub fn invalidator(&self) -> Invalidator {
        self.invalidator.clone()
    }

    /// Waits until the connection ends: it was unmounted or aborted.
    ///
    /// # Errors
    /// What ended it, if it was not an orderly unmount.
    pub fn wait(self) -> io::Result<()> {
        self.thread.join().map_err(|_| io::Error::other("a FUSE thread panicked"))?
    }
}

fn read_answer(socket: &OwnedFd) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0; MAX_INIT_ANSWER];
    let mut file = std::fs::File::from(socket.try_clone()?);
    let len = io::Read::read(&mut file, &mut buffer)?;
    buffer.truncate(len);
    if len < 16 {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "no answer to INIT"));
    }
    Ok(buffer)
}
