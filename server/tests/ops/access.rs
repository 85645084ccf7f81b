//! Keys, names and pages.

use mesh_llm::guard::Policy;
use reqwest::Method;
use serde_json::{Value, json};

use crate::{KEY, STOP, fake::chat, guarded, policy, raw, start};

#[tokio::test]
async fn without_a_key_there_is_nothing_but_signs_of_life() {
    let server = start(vec![STOP], policy(guarded())).await;
    for (path, want) in [
        ("/health", 200),
        ("/livez", 200),
        ("/version", 200),
        ("/v1/models", 401),
        ("/metrics", 401),
        ("/v1/models/../../livez", 200), // what the client made of it
        ("/nothing", 401),
    ] {
        let response = server.client.get(format!("{}{path}", server.url)).send().await.unwrap();
        assert_eq!(response.status().as_u16(), want, "{path}");
        assert!(response.headers().contains_key("x-request-id"), "{path}");
    }
    let refused = server.send("/v1/chat/completions", chat(json!({})).to_string()).await;
    assert_eq!((refused.status().as_u16(), refused.headers()["www-authenticate"].to_str().unwrap()), (401, "Bearer"));
    let body: Value = refused.json().await.unwrap();
    assert_eq!(body["error"]["type"], "authentication_error");
    assert_eq!(body["error"]["code"], "missing_api_key");
    assert!(server.fake.jobs.lock().unwrap().is_empty());

    let url = format!("{}/v1/chat/completions", server.url);
    let with =
        |name: &'static str, value: &str| server.client.post(&url).header(name, value).json(&chat(json!({}))).send();
    assert_eq!(with("authorization", &format!("Bearer {KEY}")).await.unwrap().status().as_u16(), 200);
    assert_eq!(with("x-api-key", KEY).await.unwrap().status().as_u16(), 200);
    let wrong = with("x-api-key", "0123456789abcdeF").await.unwrap();
    assert_eq!(wrong.status().as_u16(), 401);
    let text = wrong.text().await.unwrap();
    assert!(text.contains("invalid_api_key") && !text.contains("abcde"), "{text}");
    assert_eq!(server.fake.jobs.lock().unwrap().len(), 2);
}

#[tokio::test]
async fn anthropics_clients_are_refused_in_their_own_words() {
    let server = start(vec![], policy(guarded())).await;
    let request = server.client.post(format!("{}/v1/messages", server.url)).header("x-request-id", "mine");
    let refused = request.body("{}").send().await.unwrap();
    assert_eq!(
        (refused.status().as_u16(), refused.headers()["content-type"].to_str().unwrap()),
        (401, "application/json")
    );
    let body: Value = refused.json().await.unwrap();
    let message = body["error"]["message"].as_str().unwrap();
    assert_eq!(
        body,
        json!({ "type": "error", "error": { "type": "authentication_error", "message": message }, "request_id": "mine" })
    );
}

#[tokio::test]
async fn a_large_request_without_a_key_gets_its_answer() {
    let server = start(vec![], policy(guarded())).await;
    let refused = server.send("/v1/chat/completions", " ".repeat(900 << 10)).await;
    assert_eq!(refused.status().as_u16(), 401);
}

#[tokio::test]
async fn names_that_are_not_the_servers_are_refused() {
    let server = start(vec![], policy(Policy { keys: Default::default(), ..guarded() })).await;
    let ask = async |host: &str| {
        let answer = raw(&server, &format!("GET /livez HTTP/1.1\r\n{host}connection: close\r\n\r\n")).await;
        let status = answer.split_whitespace().nth(1).unwrap_or_default().to_owned();
        (status, answer)
    };
    for (host, want) in [
        ("host: localhost\r\n", "200"),
        ("host: 127.0.0.1:1\r\n", "200"),
        ("host: [::1]\r\n", "200"),
        ("host: box.lan\r\n", "200"),
        ("host: evil.example\r\n", "403"),
        ("host: localhost.evil.example\r\n", "403"),
        ("host: localhost\r\nhost: localhost\r\n", "400"),
        ("host: a b\r\n", "400"),
        ("host:\r\n", "400"),
        ("", "400"),
    ] {
        assert_eq!(ask(host).await.0, want, "{host}");
    }
    let (_, answer) = ask("host: evil.example\r\n").await;
    assert!(answer.contains("--allow-host evil.example"), "{answer}");
}

#[tokio::test]
async fn a_page_of_another_server_is_told_what_it_may_do() {
    let server = start(vec![STOP], policy(guarded())).await;
    let url = format!("{}/v1/chat/completions", server.url);
    let ask = |method: Method, origin: &str, headers: &[(&'static str, &str)]| {
        let request = server.client.request(method, &url).header("origin", origin).json(&chat(json!({})));
        headers.iter().fold(request, |request, (name, value)| request.header(*name, *value)).send()
    };
    let preflight =
        [("access-control-request-method", "POST"), ("access-control-request-headers", "authorization,x-stainless-os")];
    let answer = ask(Method::OPTIONS, "https://app.example", &preflight).await.unwrap();
    let header = |name: &str| answer.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
    assert_eq!(answer.status().as_u16(), 204);
    assert_eq!(header("access-control-allow-origin").as_deref(), Some("https://app.example"));
    assert_eq!(header("access-control-allow-headers").as_deref(), Some("authorization,x-stainless-os"));
    assert!(header("access-control-allow-methods").unwrap().contains("POST"));
    assert_eq!(header("vary").as_deref(), Some("origin"));

    let key = format!("Bearer {KEY}");
    let answer = ask(Method::POST, "https://app.example", &[("authorization", &key)]).await.unwrap();
    assert_eq!(answer.status().as_u16(), 200);
    assert_eq!(answer.headers()["access-control-allow-origin"], "https://app.example");
    // A page has to be able to read that its key is missing.
    let answer = ask(Method::POST, "https://app.example", &[]).await.unwrap();
    assert_eq!(answer.status().as_u16(), 401);
    assert_eq!(answer.headers()["access-control-allow-origin"], "https://app.example");

    for (method, headers) in [(Method::OPTIONS, &preflight[..]), (Method::POST, &[("authorization", key.as_str())])] {
        let answer = ask(method, "https://evil.example", headers).await.unwrap();
        assert_eq!(answer.status().as_u16(), 403);
        assert!(!answer.headers().contains_key("access-control-allow-origin"));
        assert!(answer.text().await.unwrap().contains("--cors-origin https://evil.example"));
    }
    assert_eq!(server.fake.jobs.lock().unwrap().len(), 1, "the one that was allowed");
}

#[tokio::test]
async fn unless_it_is_asked_for_nothing_is_said_of_cors() {
    let server = start(vec![STOP], policy(Policy::default())).await;
    let url = format!("{}/v1/models", server.url);
    let answer = server.client.get(&url).header("origin", "https://app.example").send().await.unwrap();
    let said: Vec<_> = answer.headers().keys().filter(|name| name.as_str().starts_with("access-control")).collect();
    assert!(answer.status().is_success() && said.is_empty() && !answer.headers().contains_key("vary"), "{said:?}");
}
