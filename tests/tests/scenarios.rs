//! The platform end to end, looked at from outside: HTTP from the clients' network, `/proc`, cgroups, processes. Our
//! own status is never the proof. Each test has a testbed of its own; all need root.

#![allow(clippy::unwrap_used)] // Helpers of tests; clippy spares only functions marked as tests.

mod scenarios {
    mod confinement;
    mod control_plane;
    mod ipv6;
    mod jobs;
    mod moves;
    mod mtu;
    mod overflow;
    mod refusals;
    mod trace;
    mod traffic;
    mod udp;
    mod world;
}
