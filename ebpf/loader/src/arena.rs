//! The bucket arena as memory: the array map is mapped into this process, so filling a table is a plain copy.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
    ptr::NonNull,
    thread,
    time::Instant,
};

use anyplace_ebpf_common::{Bucket, Range};

use crate::{Error, allocator::Allocator};

/// The mapped array and its free ranges.
#[derive(Debug)]
pub(crate) struct Arena {
    memory: NonNull<Bucket>,
    allocator: Allocator,
}

// SAFETY: the mapping belongs to this value alone, and is not tied to the thread that made it.
unsafe impl Send for Arena {}
// SAFETY: this process writes through `&mut self` only.
unsafe impl Sync for Arena {}

impl Arena {
    /// Maps the array behind `map`, of `capacity` slots, of which `used` are taken.
    pub(crate) fn new(
        map: BorrowedFd<'_>,
        capacity: u32,
        used: impl IntoIterator<Item = Range>,
    ) -> Result<Self, io::Error> {
        // SAFETY: a fresh mapping at an address that the kernel chooses; the map was made with BPF_F_MMAPABLE and
        // `capacity` slots of eight bytes, so the mapping is as long as the array.
        let memory = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes(capacity),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.as_raw_fd(),
                0,
            )
        };
        if memory == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let memory = NonNull::new(memory.cast()).ok_or(io::ErrorKind::Other)?;
        Ok(Self { memory, allocator: Allocator::new(capacity, used) })
    }

    /// A range of `len` slots; waits for a resting range if nothing else is left.
    pub(crate) fn allocate(&mut self, len: u64) -> Result<Range, Error> {
        let full = Error::ArenaFull { wanted: len, capacity: self.allocator.capacity() };
        let Ok(len) = u32::try_from(len) else { return Err(full) };
        loop {
            let now = Instant::now();
            if let Some(range) = self.allocator.allocate(len, now) {
                return Ok(range);
            }
            // Each turn frees the oldest resting range for good, so this ends after at most their number.
            let Some(wake) = self.allocator.next_wake() else { return Err(full) };
            thread::sleep(wake.saturating_duration_since(now));
        }
    }

    /// Takes back a range that a VIP used until now.
    pub(crate) fn release(&mut self, range: Range) {
        self.allocator.release(range, Instant::now());
    }

    /// Takes back a range that no VIP came to use.
    pub(crate) fn release_unused(&mut self, range: Range) {
        self.allocator.release_unused(range);
    }

    /// Writes `buckets` to the slots from `offset` on.
    pub(crate) fn write(&mut self, offset: u32, buckets: &[Bucket]) {
        for (index, &bucket) in buckets.iter().enumerate() {
            let slot = offset as usize + index;
            assert!(slot < self.allocator.capacity() as usize, "a table runs over the arena's end");
            // SAFETY: inside the mapping; volatile because the kernel reads it behind the compiler's back.
            unsafe { self.memory.add(slot).write_volatile(bucket) };
        }
    }

    /// Whether a range holds exactly these buckets.
    pub(crate) fn holds(&self, range: Range, buckets: &[Bucket]) -> bool {
        range.len as usize == buckets.len()
            && u64::from(range.offset) + u64::from(range.len) <= u64::from(self.allocator.capacity())
            && buckets.iter().enumerate().all(|(index, bucket)| {
                // SAFETY: inside the mapping, by the condition above.
                *bucket == unsafe { self.memory.add(range.offset as usize + index).read_volatile() }
            })
    }

    /// The buckets of a range; slots beyond the arena are left out.
    pub(crate) fn read(&self, range: Range) -> Vec<Bucket> {
        let end = range.offset.saturating_add(range.len).min(self.allocator.capacity());
        (range.offset..end)
            // SAFETY: inside the mapping.
            .map(|slot| unsafe { self.memory.add(slot as usize).read_volatile() })
            .collect()
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`, of the same length.
        unsafe { libc::munmap(self.memory.as_ptr().cast(), bytes(self.allocator.capacity())) };
    }
}

const fn bytes(capacity: u32) -> usize {
    capacity as usize * size_of::<Bucket>()
}
