//! Map layouts and wire formats shared by the eBPF programs and their loader.
