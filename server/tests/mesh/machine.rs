//! A machine of a mesh: the program with a home of its own, on loopback or in a network namespace.

use std::{
    io::{BufRead, BufReader, Read},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use serde_json::{Value, json};

/// How long anything may take that should not take long, on a machine that does much else.
pub const SOON: Duration = Duration::from_secs(30);
/// The lease of three machines: so long one that is gone may be asked, a request to it take, and one that is ready again
/// go unused.
pub const LEASE: Duration = Duration::from_secs(5);
/// After this the lease of a machine is over, however late its last pulse was.
pub const LEASE_OVER: Duration = Duration::from_secs(6);

/// One machine.
pub struct Machine {
    root: tempfile::TempDir,
    name: &'static str,
    /// What it runs.
    command: &'static str,
    /// The network namespace that it is in.
    pub space: Option<String>,
    /// More arguments of the program.
    pub args: Vec<String>,
    process: Option<Child>,
    /// What it said on standard error.
    pub log: Arc<Mutex<String>>,
    pub url: String,
}

impl Machine {
    pub fn new(name: &'static str, models: &[(&'static str, PathBuf)]) -> Self {
        let table = |(name, path): &(&str, PathBuf)| {
            format!("[[models]]\nmodel = {path:?}\nname = \"{name}\"\nbackend = \"mlx\"\npin = true\n")
        };
        let tables: String = models.iter().map(table).collect();
        Self::with(name, if models.is_empty() { "client" } else { "serve" }, &format!("memory = \"2GiB\"\n{tables}"))
    }

    /// One that runs this command, with this configuration file.
    pub fn with(name: &'static str, command: &'static str, config: &str) -> Self {
        let root = tempfile::tempdir().unwrap();
        std::fs::write(root.path().join("config.toml"), config).unwrap();
        let loopback = ["--mesh-host", "127.0.0.1", "--mesh-port", "0", "--no-mdns"].map(str::to_owned).to_vec();
        Self {
            root,
            name,
            command,
            space: None,
            args: loopback,
            process: None,
            log: Arc::default(),
            url: String::new(),
        }
    }

    /// Its configuration file.
    pub fn config(&self) -> String {
        self.root.path().join("config.toml").display().to_string()
    }

    fn command(&self) -> Command {
        let program = env!("CARGO_BIN_EXE_mesh-llm");
        let mut command = match &self.space {
            Some(space) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", space, program]);
                command
            }
            None => Command::new(program),
        };
        command.env("HOME", self.root.path()).env("MESH_LLM_MESH_DIR", self.root.path().join("mesh"));
        command.env("MESH_LLM_CACHE", self.root.path().join("cache"));
        for name in ["XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE"] {
            command.env_remove(name);
        }
        command
    }

    /// Runs a command to its end; what it says, and whether it did what it should.
    pub fn run(&self, args: &[&str]) -> (bool, String) {
        let output = self.command().args(args).stdin(Stdio::null()).output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&said).into_owned())
    }

    /// The same where it has to succeed; what it says on standard output.
    pub fn done(&self, args: &[&str]) -> String {
        let output = self.command().args(args).stdin(Stdio::null()).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
    }

    /// Serves, and waits until it listens.
    pub fn start(&mut self, ticket: Option<&str>) {
        let mut command = self.command();
        command
            .args([self.command, "--port", "0", "--node-name", self.name, "--config"])
            .arg(self.root.path().join("config.toml"));
        command.args(&self.args).env("MESH_LLM_LOG", "info,mesh_backend_mesh=debug");
        if let Some(ticket) = ticket {
            command.args(["--join", ticket]);
        }
        let mut process = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (mut errors, log) = (process.stderr.take().unwrap(), self.log.clone());
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(read @ 1..) = errors.read(&mut bytes) {
                log.lock().unwrap().push_str(&String::from_utf8_lossy(&bytes[..read]));
            }
        });
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines().map_while(Result::ok);
        let url = lines.find_map(|line| line.strip_prefix("listening on ").map(str::to_owned));
        self.url = url.unwrap_or_else(|| panic!("{} never listened: {}", self.name, self.log.lock().unwrap()));
        std::thread::spawn(move || lines.for_each(drop));
        self.process = Some(process);
    }

    /// Ends it as a failing machine does: it says nothing.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    /// A ticket for one machine, once it is known where this one can be reached.
    pub fn ticket(&self) -> String {
        let known = self.root.path().join("mesh").join("address.json");
        wait_for("its address", || known.exists());
        self.done(&["mesh", "invite", "--once", "--expires", "10m"])
    }

    /// Asks it something by HTTP: status and answer. From within its namespace, where it has one.
    pub fn get(&self, path: &str) -> (u16, Value) {
        self.curl(&[], path)
    }

    /// The same with a body. Status 0 is no answer.
    pub fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        self.curl(&["-H", "content-type: application/json", "-d", &body.to_string()], path)
    }

    fn curl(&self, args: &[&str], path: &str) -> (u16, Value) {
        let mut command = match &self.space {
            Some(space) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", space, "curl"]);
                command
            }
            None => Command::new("curl"),
        };
        let limit = SOON.as_secs().to_string();
        command.args(["-s", "-m", &limit, "-w", "\n%{http_code}"]).args(args).arg(format!("{}{path}", self.url));
        let output = String::from_utf8(command.output().unwrap().stdout).unwrap();
        let (body, status) = output.rsplit_once('\n').unwrap();
        (status.parse().unwrap(), serde_json::from_str(body).unwrap_or(Value::Null))
    }

    /// The names of the models that it lists.
    pub fn models(&self) -> Vec<String> {
        let (_, list) = self.get("/v1/models");
        list["data"].as_array().into_iter().flatten().map(|model| model["id"].as_str().unwrap().to_owned()).collect()
    }

    /// A completion that is the same every time: its text, or the status and code of a refusal.
    pub fn complete(&self, model: &str, prompt: &str) -> Result<String, (u16, String)> {
        let body = json!({ "model": model, "prompt": prompt, "max_tokens": 6, "temperature": 0 });
        let (status, answer) = self.post("/v1/completions", &body);
        match status {
            200 => Ok(answer["choices"][0]["text"].as_str().unwrap().to_owned()),
            status => Err((status, answer["error"]["code"].as_str().unwrap_or_default().to_owned())),
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("--- {} said:\n{}", self.name, self.log.lock().unwrap());
        }
    }
}

/// How long something takes that may take as long as a lease.
pub fn within_lease(what: &str, began: Instant, mut come: impl FnMut() -> bool) {
    while !come() {
        assert!(began.elapsed() < LEASE, "not within {LEASE:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
    println!("{what}: after {:?}", began.elapsed());
    assert!(began.elapsed() < LEASE, "after {:?}: {what}", began.elapsed());
}

/// Waits for something that comes soon.
pub fn wait_for(what: &str, mut come: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !come() {
        assert!(Instant::now() < deadline, "not within {SOON:?}: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}
