//! Answers to requests that a predecessor left, for kernels that do not send them again (before 6.9).
//!
//! Each is made anew from what the journal has of it and given to a session of its own, over a socket in place of the device;
//! what that answers goes to the device. So there is one way in which requests are worked on.

use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};

use fuser::{Config, Filesystem, SessionACL};
use millstream_sys::fuse_device::{message_pair, write_message};
use rustix::io::Errno;
use tracing::{debug, info, warn};

use crate::adapter::MAX_READ;
use crate::journal::{Noted, Operation, RESENT};

/// Requests that are worked on at once: one that waits for the network does not hold up the others.
const AT_ONCE: usize = 32;
/// Bytes of the longest answer.
const MAX_ANSWER: usize = MAX_READ as usize + 4096;
/// `FUSE_INIT_EXT` in linux/fuse.h: there are further flags.
const INIT_EXT: u32 = 1 << 30;
/// `FUSE_HAS_RESEND` among them.
const HAS_RESEND: u32 = 1 << 7;

/// Whether the kernel that sent this INIT request sends unanswered requests again when asked.
pub(crate) fn sends_again(init: &[u8]) -> bool {
    // struct fuse_in_header (40 bytes), then major, minor, max_readahead, flags, flags2 of struct fuse_init_in.
    let word = |at: usize| init.get(at..at + 4).and_then(|word| word.try_into().ok()).map_or(0, u32::from_le_bytes);
    word(52) & INIT_EXT != 0 && word(56) & HAS_RESEND != 0
}

/// Starts to answer `left` on threads of its own.
///
/// # Errors
/// When these cannot be started.
pub(crate) fn answer<F: Filesystem>(fs: F, init: &[u8], device: OwnedFd, left: Vec<Noted>) -> io::Result<()> {
    if left.is_empty() {
        return Ok(());
    }
    info!(requests = left.len(), "answering what the last worker left; this kernel does not send it again");
    let (for_fuser, ours) = message_pair()?;
    rustix::net::sockopt::set_socket_send_buffer_size_force(&for_fuser, MAX_ANSWER * 2)?;
    write_message(ours.as_fd(), init)?;
    let mut config = Config::default();
    config.acl = SessionACL::All;
    config.n_threads = Some(1);
    config.clone_fd = false;
    let session = fuser::Session::from_fd(fs, for_fuser, SessionACL::All, config)?;
    std::thread::Builder::new().name("fuse-left".into()).spawn(move || {
        // It ends when our end of the socket is closed, which it takes for an error.
        let ended = session.run();
        debug!(outcome = ?ended, "no more of what the last worker left");
    })?;
    std::thread::Builder::new().name("fuse-left".into()).spawn(move || {
        if let Err(error) = exchange(&ours, &device, &left) {
            warn!(%error, "not everything that the last worker left is answered; these programs wait until the mount goes");
        }
    })?;
    Ok(())
}

fn exchange(socket: &OwnedFd, device: &OwnedFd, left: &[Noted]) -> io::Result<()> {
    let mut from = std::fs::File::from(socket.try_clone()?);
    let mut buffer = vec![0; MAX_ANSWER];
    // The answer to INIT, which the kernel has.
    let _ = from.read(&mut buffer)?;
    let (mut sent, mut answered) = (0, 0);
    while answered < left.len() {
        while let Some(noted) = left.get(sent).filter(|_| sent - answered < AT_ONCE) {
            write_message(socket.as_fd(), &request(noted))?;
            sent += 1;
        }
        let len = from.read(&mut buffer)?;
        if len == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        answered += 1;
        let Some(answer) = buffer.get_mut(..len) else { continue };
        // This kernel does not know the bit; it is the highest of struct fuse_out_header's `unique`.
        if let Some(byte) = answer.get_mut(15) {
            *byte &= 0x7f;
        }
        match write_message(device.as_fd(), answer) {
            Ok(()) => {}
            // It was answered just before the death, or whoever waited for it is gone.
            Err(error) if error.raw_os_error() == Some(Errno::NOENT.raw_os_error()) => {}
            Err(error) => warn!(%error, "an answer was not taken"),
        }
    }
    Ok(())
}

/// The request as the kernel sends it.
pub(crate) fn request(noted: &Noted) -> Vec<u8> {
    let mut body = Vec::new();
    match Operation::of(noted.opcode) {
        // struct fuse_read_in
        Some(Operation::Read | Operation::ReadDir | Operation::ReadDirPlus) => {
            body.extend([0; 8]);
            body.extend(noted.offset.to_le_bytes());
            body.extend(noted.size.to_le_bytes());
            body.extend([0; 20]);
        }
        // struct fuse_getxattr_in
        Some(Operation::GetXattr | Operation::ListXattr) => {
            body.extend(noted.size.to_le_bytes());
            body.extend([0; 4]);
        }
        // struct fuse_getattr_in
        Some(Operation::GetAttr) => body.extend([0; 16]),
        // struct fuse_open_in
        Some(Operation::Open | Operation::OpenDir) => body.extend([0; 8]),
        // struct fuse_release_in, struct fuse_flush_in
        Some(Operation::Release | Operation::ReleaseDir | Operation::Flush) => body.extend([0; 24]),
        Some(Operation::LookUp | Operation::ReadLink | Operation::StatFs) | None => {}
    }
    if matches!(Operation::of(noted.opcode), Some(Operation::LookUp | Operation::GetXattr)) {
        body.extend(&noted.name);
        body.push(0);
    }
    // struct fuse_in_header
    let len = u32::try_from(40 + body.len()).unwrap_or(u32::MAX);
    let mut request = Vec::with_capacity(40 + body.len());
    request.extend(len.to_le_bytes());
    request.extend(noted.opcode.to_le_bytes());
    request.extend((noted.unique | RESENT).to_le_bytes());
    request.extend(noted.node.to_le_bytes());
    request.extend([0; 16]);
    request.extend(body);
    request
}
