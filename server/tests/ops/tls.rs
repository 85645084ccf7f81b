//! TLS over real connections.

use std::{fs, time::Duration};

use mesh_llm::{listen::Options, tls::Tls};
use serde_json::json;
use tokio::io::AsyncWriteExt;

use crate::{
    STOP, connect,
    fake::{Step, chat},
    rest, start,
};

/// A certificate for this machine, as files and as what a client trusts.
struct Pair {
    dir: tempfile::TempDir,
    trusted: reqwest::Certificate,
}

impl Pair {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let trusted = Self::write(&dir);
        Self { dir, trusted }
    }

    fn write(dir: &tempfile::TempDir) -> reqwest::Certificate {
        let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
        let pair = rcgen::generate_simple_self_signed(names).unwrap();
        fs::write(dir.path().join("cert.pem"), pair.cert.pem()).unwrap();
        fs::write(dir.path().join("key.pem"), pair.signing_key.serialize_pem()).unwrap();
        reqwest::Certificate::from_pem(pair.cert.pem().as_bytes()).unwrap()
    }

    fn tls(&self) -> Tls {
        Tls::read(self.dir.path().join("cert.pem"), self.dir.path().join("key.pem")).unwrap()
    }
}

fn client(trusted: &reqwest::Certificate) -> reqwest::ClientBuilder {
    reqwest::Client::builder().no_proxy().tls_certs_only([trusted.clone()])
}

#[tokio::test]
async fn both_protocols_are_served_over_tls() {
    let pair = Pair::new();
    let options = Options { tls: Some(pair.tls()), ..Options::default() };
    let server = start(vec![Step::Text("safe"), STOP], options).await;
    for (client, version) in [
        (client(&pair.trusted), reqwest::Version::HTTP_2),
        (client(&pair.trusted).http1_only(), reqwest::Version::HTTP_11),
    ] {
        let client = client.build().unwrap();
        let body = chat(json!({ "stream": true }));
        let answer = client.post(format!("{}/v1/chat/completions", server.url)).json(&body).send().await.unwrap();
        assert_eq!((answer.status().as_u16(), answer.version()), (200, version));
        let text = answer.text().await.unwrap();
        assert!(text.contains("safe") && text.contains("[DONE]"), "{text}");
    }
    // A client that trusts others does not get that far, and neither does one without TLS.
    assert!(server.client.get(format!("{}/livez", server.url)).send().await.is_err());
    assert!(server.client.get(format!("{}/livez", server.url.replace("https", "http"))).send().await.is_err());
}

#[tokio::test]
async fn a_client_that_never_agrees_is_let_go() {
    let tls = Some(Pair::new().tls());
    let server = start(vec![], Options { tls, handshake: Duration::from_millis(200), ..Options::default() }).await;
    let mut silent = connect(&server).await;
    silent.write_all(b"\x16\x03\x01").await.unwrap();
    rest(&mut silent).await;
}

#[tokio::test]
async fn certificates_are_replaced_while_the_server_runs() {
    let pair = Pair::new();
    let tls = pair.tls();
    let server = start(vec![], Options { tls: Some(tls.clone()), ..Options::default() }).await;
    let url = format!("{}/livez", server.url);
    let open = client(&pair.trusted).build().unwrap();
    assert!(open.get(&url).send().await.unwrap().status().is_success());
    let renewed = Pair::write(&pair.dir);
    tls.reload().unwrap();
    assert!(open.get(&url).send().await.is_ok(), "connections that are open go on");
    assert!(client(&pair.trusted).build().unwrap().get(&url).send().await.is_err());
    assert!(client(&renewed).build().unwrap().get(&url).send().await.is_ok());
}
