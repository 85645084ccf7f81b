//! Load on a served model, whatever backend is behind it.

use std::{
    sync::atomic::{AtomicU32, Ordering::SeqCst},
    time::Duration,
};

use futures::{StreamExt, future::join_all};
use reqwest::{Client, Response};
use serde_json::{Value, json};
use tokio::time::timeout;

/// No request takes this long unless it hangs.
const HANGS_AFTER: Duration = Duration::from_secs(60);
/// By how much a process may grow between the early and the late part of a load: allocators keep what was given back.
const GROWTH_BYTES_MAX: u64 = 8 << 20;

/// A served model.
pub struct Target {
    client: Client,
    url: String,
    model: String,
    context_tokens: u32,
}

/// Many requests of every kind.
pub struct Storm<'a> {
    pub target: &'a Target,
    pub requests: u32,
    /// Requests at the same time; no more than may run and wait.
    pub at_once: u32,
    /// How often the engine was ended so far, counted before each time.
    pub killed: &'a AtomicU32,
    /// How often that had been noticed so far: requests that begin later have to be served.
    pub noticed: &'a AtomicU32,
}

/// How requests ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Answered whole.
    pub answered: u32,
    /// Refused as they deserved.
    pub refused: u32,
    /// Left by their client.
    pub left: u32,
    /// Ended by the engine's end, which they say.
    pub broken: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Outcome {
    Answered,
    Refused,
    Left,
    Broken(String),
}

/// Numbers that repeat from run to run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u32) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % u64::from(bound)) as u32
    }
}

impl Target {
    /// The only model served at `url`, with so long a context.
    pub async fn of(url: &str, context_tokens: u32) -> Self {
        let client = Client::builder().no_proxy().build().unwrap();
        let list: Value = client.get(format!("{url}/v1/models")).send().await.unwrap().json().await.unwrap();
        let model = list["data"][0]["id"].as_str().unwrap().to_owned();
        Self { client, url: url.to_owned(), model, context_tokens }
    }

    /// `connections` at once, of which no more than `places` run and wait: each is answered whole, or told to come back.
    pub async fn crowd(&self, connections: u32, places: u32) {
        assert!(connections > places);
        let each = (0..connections).map(|n| async move {
            let body = self.completion(&mut Dice(n.into()), 40, 48, n % 2 == 0);
            let response = self.send("/v1/completions", body).await;
            let status = response.status().as_u16();
            let retry_after = response.headers().get("retry-after").map(|value| value.to_str().unwrap().to_owned());
            let text = timeout(HANGS_AFTER, response.text()).await.expect("it hangs").unwrap();
            match status {
                200 if n % 2 == 0 => assert!(text.ends_with("data: [DONE]\n\n"), "{text}"),
                200 => assert!(text.contains("\"finish_reason\""), "{text}"),
                503 => {
                    let seconds: u64 = retry_after.expect("it does not say when to come back").parse().unwrap();
                    assert!((1..=60).contains(&seconds), "{seconds} s");
                    assert!(text.contains("\"busy\""), "{text}");
                }
                other => panic!("{other}: {text}"),
            }
            (status, text.contains("\n: queued, "))
        });
        let all = timeout(HANGS_AFTER, join_all(each)).await.expect("some hang");
        let count = |status| all.iter().filter(|(one, _)| *one == status).count();
        println!("of {connections}, {} were answered and {} told to come back", count(200), count(503));
        assert!(count(200) >= places as usize && count(503) > 0);
        assert!(all.iter().any(|(_, queued)| *queued), "nobody was told the position");
    }

    /// As many as there are places: none was lost.
    pub async fn all_at_once(&self, places: u32) {
        let each = (0..places).map(|n| async move {
            let response = self.send("/v1/completions", self.completion(&mut Dice(n.into()), 40, 4, false)).await;
            assert_eq!(response.status().as_u16(), 200, "{:?}", response.text().await);
        });
        timeout(HANGS_AFTER, join_all(each)).await.expect("some hang");
    }

    /// A completion of up to so many tokens by up to so many.
    fn completion(&self, dice: &mut Dice, prompt_max: u32, answer_max: u32, stream: bool) -> Value {
        let prompt: Vec<u32> = (0..=dice.below(prompt_max)).map(|_| 10 + dice.below(400)).collect();
        json!({ "model": self.model, "prompt": prompt, "max_tokens": 1 + dice.below(answer_max), "ignore_eos": true,
            "temperature": 0, "stream": stream })
    }

    fn chat(&self, dice: &mut Dice, stream: bool) -> Value {
        let words: Vec<_> = (0..=dice.below(30)).map(|_| ["a", "the", "is", "of"][dice.below(4) as usize]).collect();
        json!({ "model": self.model, "messages": [{ "role": "user", "content": words.join(" ") }],
            "max_tokens": 1 + dice.below(16), "stream": stream })
    }

    async fn send(&self, path: &str, body: Value) -> Response {
        let request = self.client.post(format!("{}{path}", self.url)).json(&body);
        timeout(HANGS_AFTER, request.send()).await.expect("it hangs").unwrap()
    }

    /// One request of whatever kind.
    async fn one(&self, number: u32) -> Outcome {
        let mut dice = Dice(u64::from(number) << 20);
        match dice.below(20) {
            0 => self.refused(json!({ "model": self.model, "prompt": "x", "temprature": 1 }), 400).await,
            1 => self.refused(json!({ "model": "nobody", "prompt": "x" }), 404).await,
            2 => {
                let prompt = vec![9; (self.context_tokens + dice.below(100)) as usize];
                self.refused(json!({ "model": self.model, "prompt": prompt }), 400).await
            }
            3..=5 => {
                let body = self.completion(&mut dice, 150, 100, true);
                self.leave(self.send("/v1/completions", body).await, dice.below(6)).await
            }
            6 | 7 => {
                // Leaves while it waits for a blocking answer.
                let patience = Duration::from_millis(dice.below(30).into());
                let body = self.completion(&mut dice, 150, 100, false);
                match timeout(patience, self.send("/v1/completions", body)).await {
                    Ok(response) => self.whole(response, false).await,
                    Err(_) => Outcome::Left,
                }
            }
            8..=11 => self.whole(self.send("/v1/chat/completions", self.chat(&mut dice, true)).await, true).await,
            12 | 13 => self.whole(self.send("/v1/chat/completions", self.chat(&mut dice, false)).await, false).await,
            14..=16 => {
                let body = self.completion(&mut dice, 150, 30, true);
                self.whole(self.send("/v1/completions", body).await, true).await
            }
            _ => {
                let body = self.completion(&mut dice, 150, 30, false);
                self.whole(self.send("/v1/completions", body).await, false).await
            }
        }
    }

    async fn refused(&self, body: Value, status: u16) -> Outcome {
        let response = self.send("/v1/completions", body).await;
        assert_eq!(response.status().as_u16(), status, "{:?}", response.text().await);
        Outcome::Refused
    }

    async fn leave(&self, response: Response, after: u32) -> Outcome {
        if response.status() != 200 {
            return self.whole(response, true).await;
        }
        let mut bytes = response.bytes_stream();
        for _ in 0..after {
            let _ = timeout(HANGS_AFTER, bytes.next()).await.expect("it hangs");
        }
        Outcome::Left
    }

    /// An answer has to be whole, or to say that the engine ended.
    async fn whole(&self, response: Response, stream: bool) -> Outcome {
        let status = response.status().as_u16();
        let text = timeout(HANGS_AFTER, response.text()).await.expect("it hangs").unwrap();
        let error = match status {
            200 if stream && text.ends_with("data: [DONE]\n\n") => return Outcome::Answered,
            200 if stream => text.rsplit("event: error\ndata: ").next().unwrap(),
            200 => {
                assert!(text.contains("\"finish_reason\""), "{text}");
                return Outcome::Answered;
            }
            500 => &text,
            other => panic!("{other}: {text}"),
        };
        let error: Value = serde_json::from_str(error.trim()).unwrap_or_else(|_| panic!("{text}"));
        assert_eq!(error["error"]["code"], "engine_failed", "{text}");
        Outcome::Broken(error["error"]["message"].as_str().unwrap().to_owned())
    }
}

impl Storm<'_> {
    /// Sends them all. `trouble` is told how many are done and makes trouble meanwhile; `sample` is called now and then.
    pub async fn run(&self, trouble: impl AsyncFn(&AtomicU32), sample: impl Fn()) -> Report {
        let (next, done) = (AtomicU32::new(0), AtomicU32::new(0));
        let client = async || {
            let mut report = Report::default();
            loop {
                let number = next.fetch_add(1, SeqCst);
                if number >= self.requests {
                    return report;
                }
                let noticed_before = self.noticed.load(SeqCst);
                match self.target.one(number).await {
                    Outcome::Answered => report.answered += 1,
                    Outcome::Refused => report.refused += 1,
                    Outcome::Left => report.left += 1,
                    Outcome::Broken(message) => {
                        let killed = self.killed.load(SeqCst);
                        assert!(killed > noticed_before, "request {number} failed though nothing was ended: {message}");
                        assert!(message.contains("exited with signal 9"), "{message}");
                        report.broken += 1;
                    }
                }
                if done.fetch_add(1, SeqCst) % 20 == 0 {
                    sample();
                }
            }
        };
        let clients = join_all((0..self.at_once).map(|_| client()));
        let (reports, ()) = tokio::join!(clients, trouble(&done));
        reports.into_iter().fold(Report::default(), |sum, one| Report {
            answered: sum.answered + one.answered,
            refused: sum.refused + one.refused,
            left: sum.left + one.left,
            broken: sum.broken + one.broken,
        })
    }
}

/// Memory over time, sampled evenly: after a warm-up of a fifth, the median of the next fifth is about that of the last.
pub fn assert_flat(samples: &[u64]) {
    let fifth = samples.len() / 5;
    let median = |part: &[u64]| {
        let mut part = part.to_vec();
        part.sort_unstable();
        part[part.len() / 2]
    };
    let (early, late) = (median(&samples[fifth..2 * fifth]), median(&samples[samples.len() - fifth..]));
    println!("resident: {} KiB early, {} KiB late", early >> 10, late >> 10);
    assert!(late <= early + GROWTH_BYTES_MAX, "it grew from {early} to {late} bytes");
}
