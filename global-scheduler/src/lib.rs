//! The API, placement into locations, virtual IPs and the off-peak queue.
