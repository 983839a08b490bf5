//! The flow hash: the same number on every machine, so that ECMP may move a flow between ingress machines.

use crate::Address6;

/// Hashes a 5-tuple, each part as it stands in the packet.
///
/// Murmur3's 64-bit finaliser over the packed tuple: a few nanoseconds in eBPF, and any bit of the tuple flips any
/// bit of the result with probability near one half. It is not keyed: a client can choose its bucket, as it can
/// with any router that hashes addresses.
#[inline(always)]
pub const fn flow_hash(source: u32, vip: u32, source_port: u16, vip_port: u16, protocol: u8) -> u64 {
    let addresses = ((source as u64) << 32) | vip as u64;
    let rest = ((source_port as u64) << 24) | ((vip_port as u64) << 8) | protocol as u64;
    mix(addresses ^ mix(rest ^ 0x9e37_79b9_7f4a_7c15))
}

/// The same for a tuple of IPv6 addresses.
///
/// Odd multiples of its parts are added up, which the processor does side by side, and the finaliser mixes the sum: as
/// fast as two rounds of it, where one for each part would take five.
#[inline(always)]
pub const fn flow_hash6(
    source: &Address6,
    vip: &Address6,
    source_port: u16,
    vip_port: u16,
    protocol: u8,
) -> u64 {
    let rest = ((source_port as u64) << 24) | ((vip_port as u64) << 8) | protocol as u64;
    let sum = half(source[0], source[1])
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .wrapping_add(half(source[2], source[3]).wrapping_mul(0xd6e8_feb8_6659_fd93))
        .wrapping_add(half(vip[0], vip[1]).wrapping_mul(0xa076_1d64_78bd_642f))
        .wrapping_add(half(vip[2], vip[3]).wrapping_mul(0xe703_7ed1_a0b4_28db))
        .wrapping_add(rest.wrapping_mul(0x8ebc_6af0_9c88_c6e3));
    mix(sum ^ (sum >> 29))
}

/// The bucket of a hash in a table of `len` slots; any `len` works, no division is needed.
#[inline(always)]
pub const fn bucket_index(hash: u64, len: u32) -> u32 {
    (((hash >> 32) * len as u64) >> 32) as u32
}

/// The outer source port (network byte order) that spreads flows over the fabric's paths.
///
/// Taken from the bits that [`bucket_index`] uses last, inside the ephemeral range 49152-65535.
#[inline(always)]
pub const fn source_port(hash: u64) -> u16 {
    (0xc000 | (hash & 0x3fff) as u16).to_be()
}

#[inline(always)]
const fn half(high: u32, low: u32) -> u64 {
    ((high as u64) << 32) | low as u64
}

#[inline(always)]
const fn mix(mut h: u64) -> u64 {
    h ^= h >> 33;
    h = h.wrapping_mul(0xff51_afd7_ed55_8ccd);
    h ^= h >> 33;
    h = h.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    h ^ (h >> 33)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{TCP, address, port};

    fn hash_of(n: u32) -> u64 {
        let client = address([198, 51, (n >> 8) as u8, n as u8]);
        flow_hash(client, address([203, 0, 113, 1]), port(1024 + (n % 60_000) as u16), port(80), TCP)
    }

    #[test]
    fn buckets_are_filled_evenly() {
        // 100,000 flows over 97 slots: mean 1031, standard deviation 32; six of those each way.
        let mut counts = [0u32; 97];
        for n in 0..100_000 {
            counts[bucket_index(hash_of(n), 97) as usize] += 1;
        }
        assert!(counts.iter().all(|&c| (838..1224).contains(&c)), "{counts:?}");
    }

    fn hash6_of(n: u32) -> u64 {
        let client = [0xb80d_0120, 0, (n % 7).to_be(), (n / 7).to_be()];
        let vip = [0xb80d_0120, 1, 0, 0x0100_0000];
        flow_hash6(&client, &vip, port(1024 + (n % 60_000) as u16), port(80), TCP)
    }

    #[test]
    fn buckets_are_filled_evenly_by_ipv6_too() {
        let mut counts = [0u32; 97];
        for n in 0..100_000 {
            counts[bucket_index(hash6_of(n), 97) as usize] += 1;
        }
        assert!(counts.iter().all(|&c| (838..1224).contains(&c)), "{counts:?}");
    }

    #[test]
    fn one_bit_of_an_ipv6_address_changes_half_of_the_hash() {
        let mut flipped = 0;
        for bit in 0..128 {
            let mut source = [7, 6, 5, 4];
            let before = flow_hash6(&source, &[1, 2, 3, 4], 1, 2, TCP);
            source[bit / 32] ^= 1 << (bit % 32);
            let changed = (before ^ flow_hash6(&source, &[1, 2, 3, 4], 1, 2, TCP)).count_ones();
            assert!((8..=56).contains(&changed), "bit {bit} changes {changed}");
            flipped += changed;
        }
        assert!((28 * 128..36 * 128).contains(&flipped), "{flipped} of {}", 64 * 128);
    }

    #[test]
    fn one_bit_changes_half_of_the_hash() {
        let mut flipped = 0;
        for bit in 0..32 {
            flipped += (flow_hash(0, 7, 1, 2, TCP) ^ flow_hash(1 << bit, 7, 1, 2, TCP)).count_ones();
        }
        assert!((28 * 32..36 * 32).contains(&flipped), "{flipped} of {}", 64 * 32);
    }

    #[test]
    fn an_index_is_always_inside() {
        for hash in [0, u64::MAX, 1 << 63] {
            for len in [1, 2, 3, 65_537, u32::MAX] {
                assert!(bucket_index(hash, len) < len);
            }
        }
    }

    #[test]
    fn the_hash_is_part_of_the_wire_format() {
        // A change here moves every flow of a running fleet during an upgrade: then bump SCHEMA.
        assert_eq!(hash_of(1), HASH_OF_ONE);
        assert!(u16::from_be(source_port(hash_of(1))) >= 49_152);
        assert_eq!(hash6_of(1), HASH6_OF_ONE);
    }

    const HASH6_OF_ONE: u64 = 10_337_410_839_612_858_224;
    const HASH_OF_ONE: u64 = 13_960_502_821_121_147_161;
}
