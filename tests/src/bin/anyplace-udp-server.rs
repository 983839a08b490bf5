//! A container's program in the end-to-end scenarios: answers each datagram with its instance's name and the datagram.

use std::net::UdpSocket;

fn main() -> anyhow::Result<()> {
    let port: u16 = std::env::args().nth(1).unwrap_or_default().parse()?;
    let instance = std::env::var("ANYPLACE_INSTANCE")?;
    // For clients of both families.
    let socket = UdpSocket::bind(("::", port))?;
    let mut buffer = [0; 2048];
    loop {
        let (length, from) = socket.recv_from(&mut buffer)?;
        let answer = [instance.as_bytes(), b" ", &buffer[..length]].concat();
        socket.send_to(&answer, from)?;
    }
}
