//! What a request makes its answer depend on: entity tags and ranges.
//!
//! An entity tag here is the digest in quotes, so it is a strong one.

use std::ops::Range;

use anyplace_images::Digest;
use axum::http::HeaderMap;
use axum::http::header::{IF_NONE_MATCH, IF_RANGE, RANGE};

/// What a `Range` header asks for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    All,
    Part(Range<u64>),
    Nothing,
}

/// The entity tag of content.
pub(crate) fn entity_tag(digest: &Digest) -> String {
    format!("\"{digest}\"")
}

/// Whether the client said that it has this content already.
pub(crate) fn is_known(headers: &HeaderMap, digest: &Digest) -> bool {
    headers.get_all(IF_NONE_MATCH).iter().filter_map(|value| value.to_str().ok()).any(|value| {
        let mut tags = value.split(',').map(str::trim);
        // A weak tag is enough to say that nothing changed.
        tags.any(|tag| tag == "*" || tag.strip_prefix("W/").unwrap_or(tag) == entity_tag(digest))
    })
}

/// The range that is asked for, of content with this digest and size.
pub(crate) fn asked_range(headers: &HeaderMap, digest: &Digest, size: u64) -> Asked {
    let condition = headers.get(IF_RANGE).map(|value| value.to_str().unwrap_or_default().trim());
    // A date, a weak tag or another content's tag: the client has to start over.
    if condition.is_some_and(|tag| tag != entity_tag(digest)) {
        return Asked::All;
    }
    parse_range(headers.get(RANGE).and_then(|value| value.to_str().ok()), size)
}

/// One range of bytes; several, or another unit, are answered in full, as HTTP allows.
fn parse_range(header: Option<&str>, size: u64) -> Asked {
    let Some(spec) = header.and_then(|header| header.trim().strip_prefix("bytes=")) else {
        return Asked::All;
    };
    let Some((first, last)) = spec.split_once('-') else { return Asked::All };
    let (first, last) = (first.trim(), last.trim());
    if first.is_empty() {
        return match number(last) {
            Some(0) => Asked::Nothing,
            Some(_) if size == 0 => Asked::Nothing,
            Some(count) => Asked::Part(size.saturating_sub(count)..size),
            None => Asked::All,
        };
    }
    let Some(first) = number(first) else { return Asked::All };
    let last = match last {
        "" => u64::MAX,
        text => match number(text) {
            Some(last) => last,
            None => return Asked::All,
        },
    };
    if first >= size || last < first {
        return Asked::Nothing;
    }
    Asked::Part(first..last.saturating_add(1).min(size))
}

/// A number of digits only: no sign, unlike in Rust.
pub(crate) fn number(text: &str) -> Option<u64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        for (header, size, expected) in [
            (None, 10, Asked::All),
            (Some("bytes=0-3"), 10, Asked::Part(0..4)),
            (Some("bytes=4-"), 10, Asked::Part(4..10)),
            (Some("bytes=4-100"), 10, Asked::Part(4..10)),
            (Some("bytes=-3"), 10, Asked::Part(7..10)),
            (Some("bytes=-30"), 10, Asked::Part(0..10)),
            (Some("bytes=9-9"), 10, Asked::Part(9..10)),
            (Some("bytes=0-18446744073709551615"), 10, Asked::Part(0..10)),
            (Some("bytes=10-"), 10, Asked::Nothing),
            (Some("bytes=-0"), 10, Asked::Nothing),
            (Some("bytes=0-"), 0, Asked::Nothing),
            (Some("bytes=5-4"), 10, Asked::Nothing),
            (Some("bytes=0-1,3-4"), 10, Asked::All),
            (Some("bytes=x-"), 10, Asked::All),
            (Some("bytes=+1-+5"), 10, Asked::All),
            (Some("bytes=-+3"), 10, Asked::All),
            (Some("lines=0-1"), 10, Asked::All),
        ] {
            assert_eq!(parse_range(header, size), expected, "{header:?} of {size}");
        }
    }

    #[test]
    fn conditions() {
        let digest = Digest::of(b"x");
        let other = Digest::of(b"y");
        let mut headers = HeaderMap::new();
        assert!(!is_known(&headers, &digest));
        for (value, known) in [
            (format!("\"{digest}\""), true),
            (format!("W/\"{digest}\""), true),
            (format!("\"{other}\", \"{digest}\""), true),
            ("*".to_owned(), true),
            (format!("\"{other}\""), false),
            (digest.to_string(), false),
        ] {
            headers.insert(IF_NONE_MATCH, value.parse().unwrap());
            assert_eq!(is_known(&headers, &digest), known, "{value}");
        }
        headers.insert(RANGE, "bytes=1-2".parse().unwrap());
        assert_eq!(asked_range(&headers, &digest, 10), Asked::Part(1..3));
        for (value, expected) in [
            (format!("\"{digest}\""), Asked::Part(1..3)),
            (format!("W/\"{digest}\""), Asked::All),
            ("Sat, 01 Jan 2000 00:00:00 GMT".to_owned(), Asked::All),
        ] {
            headers.insert(IF_RANGE, value.parse().unwrap());
            assert_eq!(asked_range(&headers, &digest, 10), expected, "{value}");
        }
    }
}
