//! A slow line: a network namespace at the end of a veth pair, with a token bucket on both ends and delay proxies.
//!
//! The node under test stays in the caller's network; registry and server run on the far side. Bandwidth is the
//! kernel's doing (`tbf`), delay is that of [`crate::delay`], since a kernel may lack `netem`. The line can be cut, and the far
//! side can have more addresses, each of which can fall silent ([`Link::silence`]) or forget its connections
//! ([`Link::forget`]).

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::delay::{self, Counts, Stall};
use crate::need::{product, program};
use crate::process::{Process, output, socket_accepts};
use crate::watch::Requests;
use crate::workdir::Workdir;

/// The near end of the line.
pub const NEAR: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 231, 77, 1));
/// The far end of the line.
pub const FAR: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 231, 77, 2));
/// The program that adds the delay.
pub const PROGRAM: &str = "millstream-link";
/// The program that makes an address fall silent.
pub const FILTER: &str = "iptables";
const READY: Duration = Duration::from_secs(15);

/// Properties of the line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkOptions {
    /// Megabits in a second, in each direction.
    pub megabits: u32,
    /// Time that a byte travels, in whole milliseconds: half of the round trip.
    pub one_way: Duration,
}

impl Default for LinkOptions {
    /// 200 Mbit/s with a round trip of 20 ms: a good line to a registry in the same region.
    fn default() -> Self {
        Self { megabits: 200, one_way: Duration::from_millis(10) }
    }
}

/// A line that is up. It lives as long as its workdir; its proxies as long as itself.
#[derive(Debug)]
pub struct Link {
    options: LinkOptions,
    netns: String,
    near: String,
    far: String,
    dir: PathBuf,
    log: PathBuf,
    stall: Option<Stall>,
    proxies: Vec<(PathBuf, Process)>,
}

/// What the near end of the line has seen: bytes and packets with all their headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    /// Bytes towards the node.
    pub received_bytes: u64,
    /// Bytes from the node.
    pub sent_bytes: u64,
    /// Packets towards the node.
    pub received_packets: u64,
    /// Packets from the node.
    pub sent_packets: u64,
}

impl Link {
    /// Builds the line; one in a workdir.
    ///
    /// # Errors
    ///
    /// If the kernel or a program refuses.
    pub fn up(work: &Workdir, options: LinkOptions) -> Result<Self> {
        let netns = work.netns();
        // Names of interfaces have at most 15 characters.
        let (near, far) = (format!("ms{}n", work.id()), format!("ms{}f", work.id()));
        ip(&["netns", "add", &netns])?;
        ip(&["link", "add", &near, "type", "veth", "peer", "name", &far, "netns", &netns])?;
        ip(&["address", "add", &format!("{NEAR}/30"), "dev", &near])?;
        ip(&["-n", &netns, "address", "add", &format!("{FAR}/30"), "dev", &far])?;
        ip(&["link", "set", &near, "up"])?;
        ip(&["-n", &netns, "link", "set", &far, "up"])?;
        ip(&["-n", &netns, "link", "set", "lo", "up"])?;
        let rate = format!("{}mbit", options.megabits);
        let shape = |dev| {
            ["qdisc", "add", "dev", dev, "root", "tbf", "rate", &rate, "burst", "128kb", "latency", "50ms"]
                .map(str::to_owned)
        };
        output(Command::new("tc").args(shape(&near)))?;
        output(Command::new("tc").args(["-n", &netns]).args(shape(&far)))?;
        let dir = work.dir("link")?;
        Ok(Self { options, netns, near, far, dir, log: work.log("link"), stall: None, proxies: Vec::new() })
    }

    /// Holds a share of the requests back at what is exposed from now on.
    pub fn set_stall(&mut self, stall: Option<Stall>) {
        self.stall = stall;
    }

    /// A command that will run on the far side.
    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.netns]).arg(program);
        command
    }

    /// Makes `target`, an address within the far side such as its own loopback, reachable at `port` of the far end,
    /// with the delay of the line. Says where that is.
    ///
    /// # Errors
    ///
    /// If the proxy does not start.
    pub fn expose(&mut self, port: u16, target: SocketAddr) -> Result<SocketAddr> {
        let listen = SocketAddr::new(FAR, port);
        let stats = self.dir.join(format!("stats-{port}"));
        let program = product(PROGRAM).context("millstream-link is not built")?;
        let mut command = self.command(&program);
        command.args(["delay", "--listen", &listen.to_string(), "--target", &target.to_string()]);
        command.arg("--one-way-ms").arg(self.options.one_way.as_millis().to_string());
        if let Some(stall) = self.stall {
            command.arg("--stall-every").arg(stall.every.to_string());
            command.arg("--stall-ms").arg(stall.time.as_millis().to_string());
        }
        command.arg("--stats").arg(&stats);
        let mut process = Process::spawn(PROGRAM, command, &self.log)?;
        process.wait_ready(READY, || socket_accepts(&stats))?;
        self.proxies.push((stats, process));
        Ok(listen)
    }

    /// What went through all proxies of the line.
    ///
    /// # Errors
    ///
    /// If a proxy does not answer.
    pub fn counts(&self) -> Result<Counts> {
        let mut sum = Counts::default();
        for (stats, _) in &self.proxies {
            let counts = delay::counts(stats)?;
            sum.connections += counts.connections;
            sum.turns += counts.turns;
            sum.sent += counts.sent;
            sum.received += counts.received;
        }
        Ok(sum)
    }

    /// The requests of HTTP/1.1 that went to this port of the far end.
    ///
    /// # Errors
    ///
    /// If nothing is exposed there, or the proxy does not answer.
    pub fn requests(&self, port: u16) -> Result<Requests> {
        let stats = self.dir.join(format!("stats-{port}"));
        delay::requests(&stats)
    }

    /// What the near end has seen since the line was built.
    ///
    /// # Errors
    ///
    /// If the kernel's counters cannot be read.
    pub fn traffic(&self) -> Result<Traffic> {
        let read = |name: &str| -> Result<u64> {
            let file = format!("/sys/class/net/{}/statistics/{name}", self.near);
            Ok(std::fs::read_to_string(&file).with_context(|| format!("reading {file}"))?.trim().parse()?)
        };
        Ok(Traffic {
            received_bytes: read("rx_bytes")?,
            sent_bytes: read("tx_bytes")?,
            received_packets: read("rx_packets")?,
            sent_packets: read("tx_packets")?,
        })
    }

    /// Unplugs the line at its far end: who begins a connection is told that there is no way, who has one hears nothing. `true`
    /// plugs it in again.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn plug(&self, plugged: bool) -> Result<()> {
        ip(&["-n", &self.netns, "link", "set", &self.far, if plugged { "up" } else { "down" }])
    }

    /// Gives the far side one more address, which only it reaches.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn add_address(&self, address: IpAddr) -> Result<()> {
        let prefix = if address.is_ipv4() { 32 } else { 128 };
        ip(&["-n", &self.netns, "address", "add", &format!("{address}/{prefix}"), "dev", "lo"])
    }

    /// The same, and the near side reaches it, too.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn add_reachable(&self, address: Ipv4Addr) -> Result<()> {
        self.add_address(address.into())?;
        ip(&["route", "add", &format!("{address}/32"), "via", &FAR.to_string(), "dev", &self.near])
    }

    /// Lets nothing pass to or from an address of the far side, without a word to anybody; `false` lets it pass again.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn silence(&self, address: IpAddr, silent: bool) -> Result<()> {
        let (address, how) = (address.to_string(), if silent { "-I" } else { "-D" });
        self.filter(&[how, "INPUT", "-d", &address, "-i", "ms+", "-j", "DROP"])?;
        self.filter(&[how, "OUTPUT", "-s", &address, "-o", "ms+", "-j", "DROP"])
    }

    /// Has the way to an address of the far side forget the connections that there are, as a firewall or a balancer that was
    /// started anew: what belongs to one of them is dropped from now on, without a word to anybody. New ones are let through.
    /// Once for each address, and while it is silent, so that nothing is learnt between two rules.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn forget(&self, address: IpAddr) -> Result<()> {
        let address = address.to_string();
        let unknown = ["-p", "tcp", "!", "--syn", "-m", "conntrack", "--ctstate", "NEW", "-j", "DROP"];
        self.filter(&[&["-A", "INPUT", "-d", &address][..], &unknown].concat())?;
        self.filter(&[&["-A", "OUTPUT", "-s", &address][..], &unknown].concat())
    }

    fn filter(&self, arguments: &[&str]) -> Result<()> {
        let program = program(FILTER).context("iptables is not installed")?;
        output(self.command(&program).arg("-w").args(arguments)).map(drop)
    }

    /// Does something in the far side's network, on a thread of its own. Sockets that it opens stay there, and so do threads that
    /// it starts.
    ///
    /// # Errors
    ///
    /// If the network cannot be entered, or `work` fails.
    pub fn within<T: Send + 'static>(&self, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
        let netns = File::open(Path::new("/run/netns").join(&self.netns)).context("opening the far network")?;
        let inside = std::thread::spawn(move || {
            move_into_link_name_space(std::os::fd::AsFd::as_fd(&netns), Some(LinkNameSpaceType::Network))
                .context("entering the far network")?;
            work()
        });
        inside.join().map_err(|_| anyhow!("a thread in the far network panicked"))?
    }

    /// Cuts the line, as a broken cable would; `true` joins it again.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn set_up(&self, up: bool) -> Result<()> {
        ip(&["link", "set", &self.near, if up { "up" } else { "down" }])
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // The pair goes with either end. The namespace is the workdir's, after all processes in it.
        ip(&["link", "delete", &self.near]).ok();
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    output(Command::new("ip").args(arguments)).map(drop)
}
