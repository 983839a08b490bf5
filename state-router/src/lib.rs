//! Programs the eBPF maps from routes and drives the BGP daemon.
