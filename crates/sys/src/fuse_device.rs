//! `/dev/fuse` below any FUSE library: mount it ourselves, keep the INIT request, ask for pending requests again.
//!
//! A FUSE library that opens and mounts the device by itself ties the connection to one process. Here the descriptor is
//! opened and mounted by a process that outlives the server, and the INIT request (which the kernel sends once in the life
//! of a connection) is kept, so that every later server can be told what the first one was told.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

/// Opcode of the INIT request (`FUSE_INIT` in linux/fuse.h).
const OPCODE_INIT: u32 = 26;
/// `FUSE_NOTIFY_RESEND` in linux/fuse.h, kernel 6.9 and newer.
const NOTIFY_RESEND: i32 = 7;
/// Bytes of `struct fuse_in_header`.
const IN_HEADER: usize = 40;
/// The kernel refuses reads with a smaller buffer (`FUSE_MIN_READ_BUFFER` is 8192; the largest write decides, and we are
/// asked before any was negotiated).
const READ_BUFFER: usize = 64 * 1024;

/// A mounted connection whose INIT request was taken but not answered.
#[derive(Debug)]
pub struct Mounted {
    /// The connection.
    pub device: OwnedFd,
    /// The INIT request, header included, as the kernel sent it.
    pub init: Vec<u8>,
}

/// Opens `/dev/fuse`, mounts it read-only at `mountpoint` (an existing directory) for all users with the kernel's own
/// permission checks, and takes the INIT request.
///
/// Set-user-id bits, file capabilities and device nodes of images must work inside containers, so neither `nosuid` nor
/// `nodev` is set; keep the mount point below a directory that only root can enter.
///
/// # Errors
/// When the device is missing, the mount is refused, or the kernel's first request is not INIT.
pub fn mount(source: &str, mountpoint: &Path, max_read: u32) -> io::Result<Mounted> {
    let device = File::options().read(true).write(true).open("/dev/fuse")?;
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other,max_read={max_read}",
        device.as_raw_fd()
    );
    let options = CString::new(options).map_err(io::Error::other)?;
    rustix::mount::mount(source, mountpoint, "fuse.millstream", MountFlags::RDONLY, options.as_c_str())?;
    match read_init(&device) {
        Ok(init) => Ok(Mounted { device: device.into(), init }),
        Err(error) => {
            // The mount would answer nothing; do not leave it behind.
            let _ = unmount(mountpoint);
            Err(error)
        }
    }
}

fn read_init(mut device: &File) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0; READ_BUFFER];
    let len = loop {
        match device.read(&mut buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => break other?,
        }
    };
    buffer.truncate(len);
    let opcode = buffer.get(4..8).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes);
    if len < IN_HEADER || opcode != Some(OPCODE_INIT) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "first request of the FUSE connection is not INIT"));
    }
    Ok(buffer)
}

/// Detaches whatever is mounted at `mountpoint`; open files keep it alive until they are closed.
///
/// # Errors
/// Those of `umount2(2)`; `EINVAL` when nothing is mounted there.
pub fn unmount(mountpoint: &Path) -> io::Result<()> {
    Ok(rustix::mount::unmount(mountpoint, UnmountFlags::DETACH)?)
}

/// Asks the kernel to send every request again that was read from `device` but never answered.
///
/// # Errors
/// `EINVAL` on kernels before 6.9.
pub fn resend(device: impl AsFd) -> io::Result<()> {
    // struct fuse_out_header { len, error, unique }: a notification has unique 0 and its code in `error`.
    let mut message = [0u8; 16];
    message[0..4].copy_from_slice(&16u32.to_le_bytes());
    message[4..8].copy_from_slice(&NOTIFY_RESEND.to_le_bytes());
    write_message(device.as_fd(), &message)
}

/// Answers the request `unique` with `errno`. Says whether somebody waited for it: the kernel had handed it out, and nobody had
/// answered it.
///
/// # Errors
/// Those of `write(2)`, but for the one that says that nobody waited.
pub fn answer_with_error(device: BorrowedFd<'_>, unique: u64, errno: Errno) -> io::Result<bool> {
    // struct fuse_out_header
    let mut message = [0u8; 16];
    message[0..4].copy_from_slice(&16u32.to_le_bytes());
    message[4..8].copy_from_slice(&(-errno.raw_os_error()).to_le_bytes());
    message[8..16].copy_from_slice(&unique.to_le_bytes());
    match rustix::io::write(device, &message) {
        Ok(_) => Ok(true),
        Err(Errno::NOENT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Writes one whole message (an answer or a notification) to the connection.
///
/// # Errors
/// Those of `write(2)`; a short write is an error, since the kernel takes a message whole or not at all.
pub fn write_message(device: BorrowedFd<'_>, message: &[u8]) -> io::Result<()> {
    let mut file = File::from(device.try_clone_to_owned()?);
    let written = file.write(message)?;
    if written != message.len() {
        return Err(io::Error::new(io::ErrorKind::WriteZero, "the kernel took only part of a FUSE message"));
    }
    Ok(())
}

/// Makes the descriptor number of `target` refer to what `with` refers to, as `dup3(2)` does.
///
/// The owner of `target` goes on using its number and now reaches `with`'s open file. That is the purpose: a library that
/// insists on its own handshake is given a socket for it and finds the real device under the same number afterwards.
///
/// # Errors
/// Those of `dup3(2)`.
pub fn replace(target: BorrowedFd<'_>, with: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: both numbers are open (borrowed), and replacing what a number refers to breaks no ownership: whoever owns
    // `target` still owns exactly one open description under that number.
    let result = unsafe { libc::dup3(with.as_raw_fd(), target.as_raw_fd(), libc::O_CLOEXEC) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A connected pair of sockets that keep message boundaries, like `/dev/fuse` does.
///
/// # Errors
/// Those of `socketpair(2)`.
pub fn message_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: `fds` has room for the two descriptors that the call writes.
    let result =
        unsafe { libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0, fds.as_mut_ptr()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so both are open descriptors that nobody else owns.
    Ok(unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_takes_the_init_request_and_leaves_nothing_behind() {
        if !rustix::process::geteuid().is_root() || !Path::new("/dev/fuse").exists() {
            // Past the capture of the test runner, so that it is seen and counted.
            std::io::Write::write_all(&mut std::io::stderr(), b"skipped: needs root and /dev/fuse\n").ok();
            assert!(std::env::var_os("MILLSTREAM_REQUIRE_ALL").is_none(), "a required tier was skipped");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let mounted = mount("millstream-test", dir.path(), 1 << 20).unwrap();
        assert!(mounted.init.len() > IN_HEADER + 16, "INIT of kernel 7.36 and newer carries flags2");
        let table = std::fs::read_to_string("/proc/self/mounts").unwrap();
        assert!(table.contains(dir.path().to_str().unwrap()));
        unmount(dir.path()).unwrap();
        let table = std::fs::read_to_string("/proc/self/mounts").unwrap();
        assert!(!table.contains(dir.path().to_str().unwrap()));
    }

    #[test]
    fn messages_keep_their_boundaries_and_numbers_can_be_replaced() {
        let (a, b) = message_pair().unwrap();
        write_message(a.as_fd(), b"one").unwrap();
        write_message(a.as_fd(), b"three").unwrap();
        let mut buffer = [0; 16];
        assert_eq!(rustix::io::read(&b, &mut buffer).unwrap(), 3);
        let (c, d) = message_pair().unwrap();
        replace(b.as_fd(), d.as_fd()).unwrap();
        write_message(c.as_fd(), b"under the old number").unwrap();
        assert_eq!(rustix::io::read(&b, &mut [0; 64]).unwrap(), 20);
    }
}
