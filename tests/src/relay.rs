//! Links with a delay: pairs of TUN devices in two namespaces, relayed by one process.
//!
//! The kernel here has no netem. Each link has one thread that reads a packet on one end, keeps it until its deadline,
//! and writes it at the other end. Order is kept, nothing is lost below the queue's bound.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags};
use nix::sys::time::TimeSpec;

use crate::netns;

/// Bytes that one direction may hold; more are dropped, as by a router with a full queue. At 75 ms one way it is
/// enough for 800 Mbit/s.
const QUEUE_BYTES: usize = 8 << 20;
/// Packets read from one end before the other gets its turn.
const BURST: usize = 64;
/// Largest packet: jumbo frames; the fabric's MTU is 1600.
const PACKET_BYTES: usize = 9216;

/// One link: `netns:device:netns:device:microseconds`, and `:megabits` a second where its rate is limited.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Namespace and device of both ends.
    pub ends: [(String, String); 2],
    /// One-way delay.
    pub delay: Duration,
    /// Megabits a second in each direction; none: as fast as the relay is.
    pub rate_mbit: Option<u32>,
}

impl std::fmt::Display for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [(a, a_device), (b, b_device)] = &self.ends;
        write!(f, "{a}:{a_device}:{b}:{b_device}:{}", self.delay.as_micros())?;
        self.rate_mbit.map_or(Ok(()), |rate| write!(f, ":{rate}"))
    }
}

impl FromStr for Link {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let parts: Vec<_> = text.split(':').collect();
        let (a, a_device, b, b_device, micros, rate) = match parts[..] {
            [a, a_device, b, b_device, micros] => (a, a_device, b, b_device, micros, None),
            [a, a_device, b, b_device, micros, rate] => (a, a_device, b, b_device, micros, Some(rate)),
            _ => bail!("found link `{text}`, expected netns:device:netns:device:microseconds[:megabits]"),
        };
        let rate_mbit = rate.map(str::parse).transpose().context("a link's rate in megabits a second")?;
        anyhow::ensure!(
            rate_mbit != Some(0),
            "found a link's rate of 0, expected at least 1 megabit a second"
        );
        let end = |netns: &str, device: &str| (netns.to_owned(), device.to_owned());
        let delay = Duration::from_micros(micros.parse().context("a link's delay in microseconds")?);
        Ok(Self { ends: [end(a, a_device), end(b, b_device)], delay, rate_mbit })
    }
}

/// Makes the devices of all links, prints `ready`, and relays until killed.
pub fn run(links: &[Link]) -> Result<()> {
    let mut opened = Vec::new();
    for link in links {
        let [a, b] = &link.ends;
        opened.push(([open_tun(&a.0, &a.1)?, open_tun(&b.0, &b.1)?], link.delay, link.rate_mbit));
    }
    println!("ready");
    let threads: Vec<_> = opened
        .into_iter()
        .map(|(ends, delay, rate)| std::thread::spawn(move || relay(ends, delay, rate)))
        .collect();
    for thread in threads {
        match thread.join() {
            Ok(result) => result?,
            Err(_) => bail!("a relay thread panicked"),
        }
    }
    Ok(())
}

/// Opens a TUN device in a namespace, without the packet information header.
fn open_tun(netns: &str, device: &str) -> Result<File> {
    netns::inside(netns, || {
        let tun = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .context("open /dev/net/tun")?;
        // SAFETY: all zeroes is a valid ifreq.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        if device.len() >= request.ifr_name.len() {
            bail!("interface name `{device}` is longer than {}", request.ifr_name.len() - 1);
        }
        for (to, from) in request.ifr_name.iter_mut().zip(device.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
        // SAFETY: the descriptor is open and the request is a valid ifreq that outlives the call.
        if unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &mut request) } != 0 {
            return Err(std::io::Error::last_os_error()).with_context(|| format!("make {device} in {netns}"));
        }
        Ok(tun)
    })
}

/// Packets on their way in one direction.
#[derive(Default)]
struct Queue {
    packets: VecDeque<(Instant, Vec<u8>)>,
    bytes: usize,
    /// When the last packet has left a link of limited rate.
    free_at: Option<Instant>,
}

impl Queue {
    /// When a packet that came now arrives at the other end.
    fn arrival(&mut self, length: usize, delay: Duration, rate_mbit: Option<u32>) -> Instant {
        let now = Instant::now();
        let Some(rate) = rate_mbit else { return now + delay };
        let begins = self.free_at.map_or(now, |free| free.max(now));
        // A bit at a megabit a second takes a microsecond.
        let leaves = begins + Duration::from_nanos(length as u64 * 8_000 / u64::from(rate));
        self.free_at = Some(leaves);
        leaves + delay
    }
}

fn relay(ends: [File; 2], delay: Duration, rate_mbit: Option<u32>) -> Result<()> {
    // queues[0] holds what end 0 received and end 1 will send.
    let mut queues = [Queue::default(), Queue::default()];
    let mut spare: Vec<Vec<u8>> = Vec::new();
    let mut dropped: u64 = 0;
    loop {
        let now = Instant::now();
        for (from, queue) in queues.iter_mut().enumerate() {
            while queue.packets.front().is_some_and(|(deadline, _)| *deadline <= now) {
                let Some((_, packet)) = queue.packets.pop_front() else { break };
                queue.bytes -= packet.len();
                // A device that is down refuses the packet; that is a lost packet, as on a wire.
                let _ = (&ends[1 - from]).write(&packet);
                spare.push(packet);
            }
        }
        wait(&ends, &queues)?;
        for (from, end) in ends.iter().enumerate() {
            for _ in 0..BURST {
                let mut packet = spare.pop().unwrap_or_default();
                packet.resize(PACKET_BYTES, 0);
                let length = match (&*end).read(&mut packet) {
                    Ok(length) => length,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {
                        spare.push(packet);
                        break;
                    }
                    // The device is down (EIO) or gone (EBADFD); the testbed kills us when it is done.
                    Err(_) => {
                        spare.push(packet);
                        break;
                    }
                };
                packet.truncate(length);
                if queues[from].bytes + length > QUEUE_BYTES {
                    dropped += 1;
                    if dropped.is_power_of_two() {
                        eprintln!("a delay queue is full: {dropped} packets dropped so far");
                    }
                    spare.push(packet);
                    continue;
                }
                queues[from].bytes += length;
                let arrival = queues[from].arrival(length, delay, rate_mbit);
                queues[from].packets.push_back((arrival, packet));
            }
        }
        spare.truncate(QUEUE_BYTES / PACKET_BYTES);
    }
}

/// Waits for a packet or for the next deadline.
fn wait(ends: &[File; 2], queues: &[Queue; 2]) -> Result<()> {
    let next = queues.iter().filter_map(|queue| queue.packets.front()).map(|(deadline, _)| *deadline).min();
    let timeout = next.map(|deadline| TimeSpec::from(deadline.saturating_duration_since(Instant::now())));
    let mut fds =
        [PollFd::new(ends[0].as_fd(), PollFlags::POLLIN), PollFd::new(ends[1].as_fd(), PollFlags::POLLIN)];
    match nix::poll::ppoll(&mut fds, timeout, None) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => {}
        Err(error) => return Err(error).context("wait for packets"),
    }
    let failed = |fd: &PollFd| fd.revents().is_some_and(|events| events.intersects(PollFlags::POLLERR));
    if fds.iter().any(failed) {
        // A device that is down polls as an error at once: don't spin on it.
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_reads_back_what_it_prints() {
        let link: Link = "ap-x-a:to-b:ap-x-b:to-a:60000".parse().unwrap();
        assert_eq!(link.delay, Duration::from_millis(60));
        assert_eq!(link.to_string().parse::<Link>().unwrap(), link);
        let limited: Link = "ap-x-a:to-b:ap-x-b:to-a:20000:1000".parse().unwrap();
        assert_eq!(limited.rate_mbit, Some(1_000));
        assert_eq!(limited.to_string().parse::<Link>().unwrap(), limited);
        assert!("a:b".parse::<Link>().is_err());
        assert!("a:b:c:d:1:0".parse::<Link>().is_err());
    }
}
