//! Nodes that are gone without a word, or do not speak for a while.

use mesh_core::node::Elsewhere;
use tokio::runtime::{Builder, Runtime};

use super::*;

/// The shortest lease: what is gone is not asked for longer.
const LEASE: Duration = Duration::from_secs(5);

/// A node with a runtime of its own: as that ends, or stands still, all of the node does at once and can say nothing.
struct Apart {
    runtime: Option<Runtime>,
    _mesh: Arc<Mesh>,
}

impl Apart {
    async fn start(machine: &Machine, ticket: Option<&Ticket>, fake: &Arc<Fake>) -> Self {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (options, ticket, fake) = (machine.options(), ticket.cloned(), fake.clone());
        let started = runtime.spawn(async move {
            let mesh = Mesh::start(options, ticket.as_ref()).await.unwrap();
            mesh.serve(fake);
            mesh
        });
        let mesh = started.await.unwrap();
        Self { runtime: Some(runtime), _mesh: mesh }
    }

    fn die(&mut self) {
        self.runtime.take().unwrap().shutdown_background();
    }
}

impl Drop for Apart {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// How long something takes that may take as long as a lease.
async fn within_lease(what: &str, mut done: impl FnMut() -> bool) -> Duration {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < LEASE, "not within {LEASE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    println!("{what}: after {:?}", began.elapsed());
    began.elapsed()
}

#[tokio::test(flavor = "multi_thread")]
async fn who_dies_without_a_word_is_missed_by_all_and_used_again_when_it_is_back() {
    let (one, two, three) = (Machine::new("one"), Machine::new("two"), Machine::new("three"));
    one.home().create("home").unwrap();
    let (b, c) = (Arc::new(Fake::new("b", &["common"])), Arc::new(Fake::new("c", &["common", "gamma"])));
    let first = one.start(None, None).await;
    let second = two.start(Some(&one.ticket(&first, true)), Some(&b)).await;
    let mut third = Apart::start(&three, Some(&one.ticket(&first, true)), &c).await;
    let heard = || names(&first) == ["common", "gamma"] && names(&second) == ["common", "gamma"];
    eventually("heard", || heard() && connected(&first) && connected(&second)).await;
    assert_eq!(answer(&first, "gamma", ask("x")).await.unwrap().0, "c0 c1 c2 ");

    third.die();
    let died = Instant::now();
    // Requests that are brought to it before anybody knows.
    let gone = || names(&first) == ["common"] && names(&second).is_empty();
    let (gamma, common, _) = tokio::join!(
        answer(&first, "gamma", ask("x")),
        answer(&first, "common", ask("x")),
        within_lease("nobody offers what it had", gone)
    );
    let took = died.elapsed();
    println!("the next requests: after {took:?}, {gamma:?}");
    assert!(took < LEASE, "{took:?}");
    assert!(gamma.is_err(), "{gamma:?}");
    assert_eq!(common.unwrap().0, "b0 b1 b2 ");
    // While it may come back, it is said to be away rather than unknown.
    let (engine, _) = first.engine("gamma").unwrap();
    let refused = engine.answer(ask("x")).await.err().unwrap();
    assert_eq!((refused.kind, refused.code.as_str()), (RejectionKind::Unavailable, "model_gone"));
    assert!(refused.message.contains("three does not answer") && refused.retry_after.is_some(), "{refused}");
    tokio::time::sleep(LEASE).await;
    assert!(first.engine("gamma").is_none(), "its lease is over");

    let _third = Apart::start(&three, None, &c).await;
    within_lease("both offer it again", heard).await;
    assert_eq!(answer(&first, "gamma", ask("x")).await.unwrap().0, "c0 c1 c2 ");
    assert_eq!(answer(&second, "gamma", ask("x")).await.unwrap().0, "c0 c1 c2 ");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_stands_still_is_not_asked_and_goes_on_where_it_was() {
    // Longer than three pulses, and shorter than a connection lasts on which nothing comes.
    const STILL: Duration = Duration::from_millis(1300);
    let (one, two) = (Machine::new("one"), Machine::new("two"));
    one.home().create("home").unwrap();
    let slow = Arc::new(Fake { pause: Duration::from_millis(5), ..Fake::new("b", &["beta"]) });
    let first = one.start(None, None).await;
    let second = Apart::start(&two, Some(&one.ticket(&first, true)), &slow).await;
    eventually("heard", || names(&first) == ["beta"]).await;
    eventually("pulses come", || connected(&first)).await;
    let (engine, _) = first.engine("beta").unwrap();
    let mut parts = engine.answer(Ask { tokens_max: Some(20), ..ask("x") }).await.unwrap();
    parts.next().await.unwrap().unwrap();

    second.runtime.as_ref().unwrap().spawn(async { std::thread::sleep(STILL) });
    within_lease("its pulses are missed", || names(&first).is_empty()).await;
    within_lease("it is heard again", || names(&first) == ["beta"]).await;
    let rest: Vec<_> = parts.collect().await;
    assert!(matches!(rest.last(), Some(Ok(Part::Finished(_)))), "its answer was not cut off: {rest:?}");
    assert_eq!(answer(&first, "beta", ask("x")).await.unwrap().0, "b0 b1 b2 ");
}
