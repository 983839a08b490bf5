//! The testbed: locations, machines and clients in network namespaces, and the end-to-end scenarios that run on it.
