fn main() {
    let dir = std::env::args().nth(1).unwrap();
    let listen = std::env::args().nth(2).unwrap();
    let rt = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    rt.block_on(async {
        anyplace_service::install_crypto_provider();
        let config = anyplace_registry::Config {
            listen: listen.parse().unwrap(),
            ..anyplace_registry::Config::new(dir)
        };
        let server = anyplace_registry::Server::bind(config).await.unwrap();
        let stop = tokio_util::sync::CancellationToken::new();
        let s = stop.clone();
        tokio::spawn(async move {
            let mut term = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).unwrap();
            term.recv().await;
            s.cancel();
        });
        server.serve(stop).await.unwrap();
    });
}
