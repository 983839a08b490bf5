//! A filter of addresses: a bit for each, so that most addresses that aren't there need no lookup in a hash table.

/// Words of 64 bits: 16,384 bits, 2 KiB, so that they stay in the processor's first cache. With 100 instances one other
/// address in 164 meets a bit that is set and needs the lookup; with all 4,096, one in five.
pub const FILTER_WORDS: u32 = 256;

/// The word and the bit of an address.
#[inline(always)]
pub const fn filter_bit(address: u32) -> (u32, u64) {
    // The upper bits of a product depend on all bits of the address (Fibonacci hashing).
    let place = address.wrapping_mul(0x9e37_79b1) >> 18;
    (place >> 6, 1 << (place & 63))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address;

    #[test]
    fn neighbours_have_bits_of_their_own() {
        // A machine's instances stand side by side; spread over 16,384 bits at random, 256 of them would share two.
        let mut bits = std::collections::BTreeSet::new();
        for last in 0..=255 {
            let (word, bit) = filter_bit(address([10, 1, 1, last]));
            assert!(word < FILTER_WORDS && bit.is_power_of_two());
            bits.insert((word, bit));
        }
        assert!(bits.len() >= 250, "{} bits for 256 addresses", bits.len());
    }
}
