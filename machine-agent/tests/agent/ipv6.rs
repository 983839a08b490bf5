//! Instances as IPv6 clients: from behind the machine's address, if the agent knows one.

use std::{
    fs,
    net::{Ipv6Addr, SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyplace_model::instance_address6;

use crate::{
    bed::{self, Bed, MACHINE6, OPEN6, PRIVATE6, PROTECTED6},
    in_network_of, web,
};

const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn instances_reach_the_world_by_ipv6_from_behind_the_machines_address() {
    bed::with(|mut bed| async move {
        bed.start_agent();
        bed.want(web("web-1", 65));
        bed.until_ready("web-1", 0).await;
        bed.answer_on_the_machine();
        for address in [OPEN6, PROTECTED6, PRIVATE6, MACHINE6] {
            assert!(bed.get_from_fabric(address.into(), 9_999).is_ok(), "nobody listens on {address}");
        }
        let first = bed.init_pid("web-1");
        assert_eq!(asks(first, OPEN6, 9_999), "");
        assert_eq!(setting("eth0/accept_ra"), "1");

        // The next agent knows the address: what runs already becomes a client too.
        bed.abort_agent().await;
        bed.settings += &format!("address6 = '{MACHINE6}'\n");
        bed.start_agent();
        let begun = Instant::now();
        while asks(first, OPEN6, 9_999).is_empty() {
            assert!(begun.elapsed() < PATIENCE, "{}", around(&bed));
        }
        bed.want(web("web-2", 66));
        bed.until_ready("web-2", 0).await;
        let second = bed.init_pid("web-2");
        assert_eq!(bed.init_pid("web-1"), first);
        let own = [65, 66].map(|host| instance_address6([10, 9, 1, host].into()));
        for address in own {
            let tried = TcpStream::connect_timeout(&SocketAddr::from((address, 8_080)), PATIENCE);
            assert!(tried.is_ok(), "nobody listens on {address}: {}", around(&bed));
        }
        for (pid, other) in [(first, own[1]), (second, own[0])] {
            assert!(asks(pid, OPEN6, 9_999).ends_with(&format!("seen as {MACHINE6}\n")), "{}", around(&bed));
            for (address, port) in [(PROTECTED6, 9_999), (PRIVATE6, 9_999), (MACHINE6, 9_999), (other, 8_080)]
            {
                assert_eq!(asks(pid, address, port), "", "{pid} reaches {address}");
            }
        }
        // The machine forwards, and hears its routers as before.
        assert_eq!(setting("all/forwarding"), "1");
        assert_eq!(setting("eth0/accept_ra"), "2");

        // Without the address there is no way out again.
        bed.abort_agent().await;
        bed.settings = bed.settings.lines().filter(|line| !line.starts_with("address6")).collect();
        bed.start_agent();
        let begun = Instant::now();
        while !asks(first, OPEN6, 9_999).is_empty() {
            assert!(begun.elapsed() < PATIENCE, "{}", around(&bed));
        }
        assert_eq!(asks(second, OPEN6, 9_999), "");

        for name in ["web-1", "web-2"] {
            bed.unwant(name);
            bed.until_gone(name).await;
        }
        assert_eq!(bed.leftovers(), Vec::<String>::new());
        bed.stop_agent().await;
    });
}

/// What an address answers somebody in the network of a process; nothing if it doesn't in a second.
fn asks(pid: i32, address: Ipv6Addr, port: u16) -> String {
    in_network_of(pid, &format!("echo | busybox nc -w 1 {address} {port} 2>/dev/null || true"))
}

fn setting(name: &str) -> String {
    fs::read_to_string(format!("/proc/sys/net/ipv6/conf/{name}")).unwrap().trim().to_owned()
}

/// What the machine's network looks like, for messages.
fn around(bed: &Bed) -> String {
    let run = |line: &str| {
        let output = std::process::Command::new("sh").args(["-c", line]).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let networks = bed.data().join("instances");
    run(&format!(
        "ip -6 addr; ip -6 route; ip -6 neigh; nft list ruleset; grep -r . {}/*/network",
        networks.display()
    ))
}
