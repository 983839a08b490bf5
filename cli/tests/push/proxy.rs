//! A TCP proxy that fails as networks and busy servers do, by seeded decisions.

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

use anyplace_seed::Seed;

/// Bytes that are passed on at once.
const CHUNK: usize = 16 << 10;

/// What happens to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing.
    Pass,
    /// One answer of this status, whatever is asked.
    Status(u16),
    /// Closed, by FIN or RST, after so many bytes in both directions together.
    Cut { after: u64, reset: bool },
    /// Passed on with this wait for each chunk.
    Slow(Duration),
    /// The lowest bit of the byte at this place in one direction is flipped.
    Flip { up: bool, at: u64 },
}

/// Decides for each new connection.
pub(crate) type Decide = Box<dyn FnMut(&mut Seed) -> Fault + Send>;

pub(crate) struct Proxy {
    pub(crate) url: String,
    pub(crate) counts: Arc<Counts>,
    _runtime: tokio::runtime::Runtime,
}

/// What happened.
#[derive(Default)]
pub(crate) struct Counts {
    /// Connections that weren't just passed on.
    pub(crate) faults: AtomicU64,
    /// Bytes from clients.
    pub(crate) up: AtomicU64,
    /// Flips that took place.
    pub(crate) flips: AtomicU64,
}

impl Proxy {
    pub(crate) fn start(to: &str, mut seed: Seed, mut decide: Decide) -> Proxy {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let counts = Arc::new(Counts::default());
        let (to, counted) = (to.to_owned(), counts.clone());
        runtime.spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let fault = decide(&mut seed);
                if fault != Fault::Pass {
                    counted.faults.fetch_add(1, Ordering::Relaxed);
                }
                let (to, counts) = (to.clone(), counted.clone());
                tokio::spawn(async move { drop(serve(client, &to, fault, &counts).await) });
            }
        });
        Proxy { url, counts, _runtime: runtime }
    }
}

async fn serve(mut client: TcpStream, to: &str, fault: Fault, counts: &Arc<Counts>) -> io::Result<()> {
    if let Fault::Status(status) = fault {
        let mut head = vec![0; CHUNK];
        // The request's head is enough to answer.
        let _ = client.read(&mut head).await?;
        let answer = format!(
            "HTTP/1.1 {status} Fault\r\nretry-after: 0\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
        );
        client.write_all(answer.as_bytes()).await?;
        client.shutdown().await?;
        // Until the client is done: closing with unread bytes would be a reset.
        while client.read(&mut head).await? > 0 {}
        return Ok(());
    }
    let server = TcpStream::connect(to).await?;
    let budget = Arc::new(Mutex::new(match fault {
        Fault::Cut { after, .. } => Some(after),
        _ => None,
    }));
    if let Fault::Cut { reset: true, .. } = fault {
        client.set_zero_linger()?;
    }
    let (mut client_read, mut client_write) = client.into_split();
    let (mut server_read, mut server_write) = server.into_split();
    tokio::try_join!(
        pump(&mut client_read, &mut server_write, fault, true, &budget, counts),
        pump(&mut server_read, &mut client_write, fault, false, &budget, counts),
    )?;
    Ok(())
}

async fn pump(
    from: &mut tokio::net::tcp::OwnedReadHalf,
    to: &mut tokio::net::tcp::OwnedWriteHalf,
    fault: Fault,
    up: bool,
    budget: &Mutex<Option<u64>>,
    counts: &Counts,
) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    let mut passed = 0;
    loop {
        let read = from.read(&mut buffer).await?;
        if read == 0 {
            // The other direction may go on.
            return to.shutdown().await;
        }
        let mut len = read;
        let mut cut = false;
        if let Some(left) = &mut *budget.lock().unwrap() {
            len = len.min(usize::try_from(*left).unwrap());
            *left -= len as u64;
            cut = *left == 0;
        }
        if let Fault::Flip { up: at_up, at } = fault
            && at_up == up
            && (passed..passed + len as u64).contains(&at)
        {
            buffer[usize::try_from(at - passed).unwrap()] ^= 1;
            counts.flips.fetch_add(1, Ordering::Relaxed);
        }
        if let Fault::Slow(wait) = fault {
            tokio::time::sleep(wait).await;
        }
        to.write_all(&buffer[..len]).await?;
        passed += len as u64;
        if up {
            counts.up.fetch_add(len as u64, Ordering::Relaxed);
        }
        if cut {
            // Ends the other direction too.
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
    }
}
