//! Loads, pins and updates the eBPF programs and maps.
