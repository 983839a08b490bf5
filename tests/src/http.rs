//! A small HTTP client: one request, one connection, one deadline. Enough to look at the platform from outside.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::node::Node;

/// Largest answer that is read.
const ANSWER_BYTES: usize = 4 << 20;

/// An answer.
#[derive(Clone, Debug)]
pub struct Response {
    /// Status code.
    pub status: u16,
    /// Header lines, as sent.
    pub head: String,
    /// The body, decoded if it came in chunks.
    pub body: String,
    /// From before the connection to the last byte.
    pub elapsed: Duration,
}

/// Sends one GET from a node.
pub fn http_get(node: &Node, url: &str, timeout: Duration) -> Result<Response> {
    let rest = url
        .strip_prefix("http://")
        .with_context(|| format!("found `{url}`, expected http://ADDRESS:PORT/"))?;
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    let has_port = host.rsplit(']').next().is_some_and(|end| end.contains(':'));
    let address = if has_port { host.to_owned() } else { format!("{host}:80") };
    let address: SocketAddr = address.parse().with_context(|| format!("address in `{url}`"))?;
    node.inside(|| get(address, &format!("/{path}"), timeout))
        .with_context(|| format!("GET {url} from {}", node.name()))
}

/// Sends one GET from the calling thread's namespace.
pub(crate) fn get(address: SocketAddr, path: &str, timeout: Duration) -> Result<Response> {
    let start = Instant::now();
    let deadline = start + timeout;
    let left = || {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(std::io::Error::from(ErrorKind::TimedOut)) } else { Ok(left) }
    };
    let mut stream = TcpStream::connect_timeout(&address, timeout).context("connect")?;
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(left()?))?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).context("send the request")?;
    let mut answer = Vec::new();
    let mut buffer = [0; 8192];
    loop {
        stream.set_read_timeout(Some(left().context("read the answer")?))?;
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => answer.extend_from_slice(&buffer[..length]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error).context("read the answer"),
        }
        if answer.len() > ANSWER_BYTES {
            bail!("the answer is larger than {ANSWER_BYTES} bytes");
        }
    }
    parse(&answer, start.elapsed())
}

fn parse(answer: &[u8], elapsed: Duration) -> Result<Response> {
    let text = String::from_utf8_lossy(answer);
    let Some((head, body)) = text.split_once("\r\n\r\n") else {
        bail!("the connection ended inside the answer's head, after {} bytes", answer.len());
    };
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).context("a status code")?;
    let header = |name: &str| {
        let lines = head.lines().filter_map(|line| line.split_once(':'));
        let mut values =
            lines.filter(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim());
        values.next().map(str::to_owned)
    };
    let body = if header("transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked")) {
        dechunk(body)?
    } else {
        if let Some(length) = header("content-length").and_then(|value| value.parse::<usize>().ok())
            && body.len() < length
        {
            bail!("the connection ended after {} of {length} bytes", body.len());
        }
        body.to_owned()
    };
    Ok(Response { status, head: head.to_owned(), body, elapsed })
}

fn dechunk(mut rest: &str) -> Result<String> {
    let mut body = String::new();
    loop {
        let (size, after) = rest.split_once("\r\n").context("a chunk's size")?;
        let size = usize::from_str_radix(size.split(';').next().unwrap_or_default().trim(), 16)?;
        if size == 0 {
            return Ok(body);
        }
        body.push_str(after.get(..size).context("a whole chunk")?);
        rest = after.get(size + 2..).context("a chunk's end")?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_and_chunked_answers_are_read_and_cut_ones_refused() {
        let plain = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi";
        assert_eq!(parse(plain, Duration::ZERO).unwrap().body, "hi");
        let chunked =
            b"HTTP/1.1 404 Not Found\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n1\r\n!\r\n0\r\n\r\n";
        let response = parse(chunked, Duration::ZERO).unwrap();
        assert_eq!((response.status, response.body.as_str()), (404, "hi!"));
        assert!(parse(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nhi", Duration::ZERO).is_err());
    }
}
