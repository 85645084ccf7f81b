//! Machines in network namespaces of their own, on one made-up local network: they find one another by mDNS, lose one
//! another, and what passes between them is looked at on the wire. Takes root, `ip` and `tshark`.

use std::{
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use conformance::shared::golden;
use serde_json::json;

use crate::machine::{LEASE, LEASE_OVER, Machine, wait_for, within_lease};

/// A bridge in a namespace, and namespaces with a cable to it.
struct Network {
    hub: String,
    spaces: Vec<String>,
}

fn ip(args: &str) -> bool {
    let output = Command::new("ip").args(args.split_whitespace()).stderr(Stdio::null()).status();
    output.is_ok_and(|status| status.success())
}

impl Network {
    /// With so many machines, or none if this machine does not allow it.
    fn new(machines: u8) -> Option<Self> {
        let mark = std::process::id();
        let mut network = Self { hub: format!("mesh-hub-{mark}"), spaces: Vec::new() };
        let hub = network.hub.clone();
        let made = ip(&format!("netns add {hub}"))
            && ip(&format!("-n {hub} link add br0 type bridge mcast_snooping 0"))
            && ip(&format!("-n {hub} link set br0 up"));
        if !made {
            return None;
        }
        for at in 1..=machines {
            let space = format!("mesh-{at}-{mark}");
            network.spaces.push(space.clone());
            for line in [
                format!("netns add {space}"),
                format!("-n {hub} link add port{at} type veth peer name lan0 netns {space}"),
                format!("-n {hub} link set port{at} master br0 up"),
                format!("-n {space} addr add 10.77.0.{at}/24 dev lan0"),
                format!("-n {space} link set lan0 up"),
                format!("-n {space} link set lo up"),
                format!("-n {space} route add default via 10.77.0.254"),
            ] {
                assert!(ip(&line), "ip {line}");
            }
        }
        Some(network)
    }

    /// Pulls a machine's cable, or plugs it in again.
    fn cable(&self, machine: u8, plugged: bool) {
        let state = if plugged { "up" } else { "down" };
        assert!(ip(&format!("-n {} link set port{machine} {state}", self.hub)));
    }

    /// Writes down what passes the bridge.
    fn capture(&self, file: &Path) -> Child {
        let mut tshark = Command::new("ip");
        tshark.args(["netns", "exec", &self.hub, "tshark", "-q", "-i", "br0", "-w"]).arg(file);
        let child = tshark.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        wait_for("tshark writes", || file.exists());
        child
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for space in self.spaces.iter().chain([&self.hub]) {
            ip(&format!("netns del {space}"));
        }
    }
}

fn is_there(program: &str) -> bool {
    Command::new(program).arg("--version").output().is_ok() || Command::new(program).arg("-V").output().is_ok()
}

fn contains(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

#[test]
fn machines_of_a_local_network_find_and_lose_one_another() {
    let (Some(llama), Some(qwen2), Some(qwen3)) = (golden("llama"), golden("qwen2"), golden("qwen3")) else { return };
    let network = if is_there("ip") && is_there("tshark") { Network::new(4) } else { None };
    let Some(network) = network else {
        assert!(std::env::var_os("CI").is_none(), "network namespaces and tshark have to be there in CI");
        println!("skipped: network namespaces take root, ip and tshark");
        return;
    };
    let files = tempfile::tempdir().unwrap();
    let wire = files.path().join("wire.pcapng");
    let mut capture = network.capture(&wire);

    // Names that are found nowhere by chance.
    let own = [("alpha-model-of-one", llama), ("beta-model-of-two", qwen2), ("gamma-model-of-three", qwen3)];
    let mut machines: Vec<Machine> = ["one", "two", "three"]
        .into_iter()
        .zip(&own)
        .zip(&network.spaces)
        .map(|((name, model), space)| {
            let mut machine = Machine::new(name, std::slice::from_ref(model));
            (machine.space, machine.args) = (Some(space.clone()), Vec::new());
            machine
        })
        .collect();
    machines[0].done(&["mesh", "create", "--name", "name-of-the-mesh"]);
    // Nothing has run there yet: this ticket knows no address, and has to be good by mDNS alone.
    let nameless = machines[0].done(&["mesh", "invite", "--once"]);
    machines[0].start(None);
    let addressed = machines[0].ticket();
    machines[1].args = vec!["--no-mdns".into()];
    machines[1].start(Some(&addressed));
    machines[2].start(Some(&nameless));
    for machine in &machines {
        wait_for("all three models", || machine.models().len() == 3);
        for (model, _) in &own {
            assert!(machine.complete(model, "A prompt that is secret").is_ok(), "{model}");
        }
    }

    // Who has no ticket, and who has a wrong one.
    let mut stranger = Machine::new("stranger", &[]);
    (stranger.space, stranger.args) = (Some(network.spaces[3].clone()), Vec::new());
    let used = stranger.run(&["client", "--port", "0", "--join", &nameless]);
    assert!(!used.0 && used.1.contains("for one node"), "{}", used.1);
    stranger.done(&["mesh", "create", "--name", "another"]);
    stranger.start(None);
    std::thread::sleep(Duration::from_secs(3));
    assert!(stranger.models().is_empty(), "{:?}", stranger.get("/v1/mesh"));
    assert_eq!(machines[0].get("/v1/mesh").1["sources"][0]["status"]["nodes"].as_array().unwrap().len(), 2);

    // A cable is pulled: what is behind it is refused within the lease, and nothing hangs.
    network.cable(3, false);
    let pulled = Instant::now();
    let gamma = own[2].0;
    std::thread::scope(|scope| {
        scope.spawn(|| within_lease("the pulled cable is noticed", pulled, || machines[0].models().len() == 2));
        while pulled.elapsed() < LEASE_OVER {
            let asked = Instant::now();
            match machines[0].complete(gamma, "x") {
                Ok(text) => panic!("nobody can have said {text}"),
                Err((status, code)) => assert!(matches!(status, 404 | 503) && !code.is_empty(), "{status} {code}"),
            }
            assert!(asked.elapsed() < LEASE, "it hangs");
            std::thread::sleep(Duration::from_millis(50));
        }
    });
    assert_eq!(machines[0].complete(gamma, "x").unwrap_err(), (404, "model_not_found".into()));
    assert!(machines[2].models() == [gamma] && machines[1].models().len() == 2);
    assert!(machines[0].complete(own[1].0, "x").is_ok() && machines[1].complete(own[0].0, "x").is_ok());
    network.cable(3, true);
    let plugged = Instant::now();
    wait_for("the network is whole again", || machines.iter().all(|machine| machine.models().len() == 3));
    println!("the network is whole again: after {:?}", plugged.elapsed());
    assert!(machines[0].complete(gamma, "x").is_ok());

    // One dies, and comes back.
    machines[1].kill();
    within_lease("its loss is noticed", Instant::now(), || {
        machines[0].models().len() == 2 && machines[2].models().len() == 2
    });
    machines[1].start(None);
    wait_for("it is ready", || machines[1].complete(own[1].0, "x").is_ok());
    within_lease("it is used again", Instant::now(), || machines[2].complete(own[1].0, "x").is_ok());

    // SAFETY: a plain system call on a child of this test, which has not been waited for.
    unsafe { libc::kill(capture.id().cast_signed(), libc::SIGINT) };
    capture.wait().unwrap();
    let seen = std::fs::read(&wire).unwrap();
    assert!(seen.len() > 100_000, "{} bytes were seen", seen.len());
    assert!(contains(&seen, "mesh-llm"), "what mDNS asks for is seen, so that the capture is of these machines");
    let secrets = own.iter().map(|(model, _)| *model).chain(["A prompt that is secret", "name-of-the-mesh", "llama"]);
    for secret in secrets {
        assert!(!contains(&seen, secret), "`{secret}` is on the wire");
    }
    let shown = json!([machines[0].get("/v1/models").1, machines[0].get("/v1/mesh").1]).to_string();
    assert!(!shown.contains("10.77.0."), "{shown}");
}
