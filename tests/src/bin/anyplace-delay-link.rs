//! Relays the testbed's delayed links; started by the testbed, one process for all links.

fn main() -> anyhow::Result<()> {
    let links: Vec<_> = std::env::args().skip(1).map(|arg| arg.parse()).collect::<anyhow::Result<_>>()?;
    anyplace_tests::relay::run(&links)
}
