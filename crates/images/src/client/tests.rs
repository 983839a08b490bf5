use super::*;

fn base_of(client: &Client, reference: &str) -> (String, String, bool) {
    let target = client.target(&reference.parse().unwrap()).unwrap();
    (target.name(), target.repository, target.credentials.is_some())
}

#[test]
fn references_go_to_the_right_registry() {
    let credentials = Credentials { user: "u".into(), password: "p".into() };
    let client = Client::new("http://10.1.0.10:5000", Some(credentials)).unwrap();
    let own = ("http://10.1.0.10:5000".to_owned(), "app".to_owned(), true);
    assert_eq!(base_of(&client, "app"), own);
    assert_eq!(base_of(&client, "10.1.0.10:5000/app:v1"), own);
    let hub = ("https://registry-1.docker.io".to_owned(), "library/busybox".to_owned(), false);
    assert_eq!(base_of(&client, "docker.io/busybox"), hub);
    assert_eq!(base_of(&client, "127.0.0.1:5001/a").0, "http://127.0.0.1:5001");
    assert_eq!(base_of(&client, "example.org/a/b").0, "https://example.org");
    // A name may be called like an address.
    assert_eq!(base_of(&client, "127.example.org/a").0, "https://127.example.org");
    assert!(is_loopback("localhost:5000") && is_loopback("[::1]:5000") && !is_loopback("[::2]"));
}

/// Time passes at once where nothing happens.
#[tokio::test(start_paused = true)]
async fn a_silent_registry_is_given_up() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", silent.local_addr().unwrap());
    let client = Client::new(&url, None).unwrap().with_patience(Patience::NONE);
    let reference: Reference = "app:v1".parse().unwrap();
    let digest = Digest::of(b"");
    let begun = tokio::time::Instant::now();
    let asked = tokio::join!(
        async { client.head_manifest(&reference).await.err() },
        async { client.get_manifest(&reference).await.err() },
        async { client.list_tags(&reference).await.err() },
        async { client.list_referrers(&reference, &digest).await.err() },
        async { client.head_blob(&reference, &digest).await.err() },
        async { client.check_push(&reference).await.err() },
    );
    for error in [asked.0, asked.1, asked.2, asked.3, asked.4, asked.5] {
        assert!(error.as_ref().is_some_and(Error::is_unreachable), "{error:?}");
    }
    assert!(begun.elapsed() < 2 * ANSWER_TIMEOUT);
    assert_eq!(client.stats().answered, 0);
}

#[test]
fn bad_registries_are_refused() {
    for bad in ["", "10.1.0.10:5000", "ftp://x", "unix:/run/x"] {
        assert!(Client::new(bad, None).is_err(), "{bad}");
    }
}

#[test]
fn credentials_are_not_printed() {
    let credentials = Credentials { user: "u".into(), password: "secret".into() };
    assert!(!format!("{credentials:?}").contains("secret"));
}
