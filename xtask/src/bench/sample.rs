//! Repeated measurements.

/// The middle of some measurements.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

/// Memory that is touched before a measurement: more than one takes.
const WARM_BYTES: usize = 3 << 30;

/// Writes out what others left unwritten, so that it doesn't fall into the next measurement, and touches memory: free
/// memory of a virtual machine may be the host's again after two seconds, and then costs up to 1 CPU-s a GiB to get
/// back, whoever is measured.
pub(crate) fn settle() {
    nix::unistd::sync();
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE;
    // SAFETY: a mapping of its own, that nothing else points into.
    unsafe {
        let memory =
            libc::mmap(std::ptr::null_mut(), WARM_BYTES, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
        if memory != libc::MAP_FAILED {
            libc::munmap(memory, WARM_BYTES);
        }
    }
}
