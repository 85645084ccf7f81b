//! The program as a process, and what Linux tells about it.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

/// The program, serving. Killed when the test ends before it does.
pub struct Program {
    process: Child,
    pub url: String,
    _home: tempfile::TempDir,
}

impl Program {
    /// Starts it. `{DIR}` in `config` is where llama-server's own tests install it.
    pub fn start(args: &[&str], config: &str) -> Self {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("config.toml");
        let target = Path::new(env!("CARGO_BIN_EXE_mesh-llm")).parent().unwrap().parent().unwrap();
        let folder = format!("{:?}", target.join("llama-server"));
        fs::write(&path, config.replace("{DIR}", &folder)).unwrap();
        let mut process = Command::new(env!("CARGO_BIN_EXE_mesh-llm"))
            .args(["--port", "0", "--config"])
            .arg(&path)
            .args(args)
            .env("MESH_LLM_CACHE", home.path().join("cache"))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines().map_while(Result::ok);
        let url = lines.find_map(|line| line.strip_prefix("listening on ").map(str::to_owned));
        let url = url.unwrap_or_else(|| panic!("mesh-llm {args:?} never listened"));
        // Whatever else it says must not block it.
        std::thread::spawn(move || lines.for_each(drop));
        Self { process, url, _home: home }
    }

    /// Memory that it holds now, its children's not included.
    pub fn resident_bytes(&self) -> u64 {
        let statm = fs::read_to_string(format!("/proc/{}/statm", self.process.id())).unwrap();
        statm.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
    }

    /// The child that serves the model, once there is exactly one.
    pub async fn only_child(&self) -> u32 {
        loop {
            if let [child] = self.children()[..] {
                return child;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Waits for the successor of a child.
    pub async fn child_other_than(&self, old: u32) {
        while !self.children().iter().any(|child| *child != old) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Asks it to end, which takes no time where nobody is left in it.
    pub fn ends(&mut self) {
        signal(self.process.id(), libc::SIGTERM);
        for _ in 0..2000 {
            if let Some(status) = self.process.try_wait().unwrap() {
                assert_eq!(status.code(), Some(0));
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("it does not end, though nobody uses it");
    }

    /// Its children that still run.
    fn children(&self) -> Vec<u32> {
        let own = self.process.id().to_string();
        let all = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        all.filter(|pid: &u32| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let mut fields = stat.rsplit(") ").next().unwrap_or_default().split_whitespace();
            fields.next().is_some_and(|state| state != "Z") && fields.next() == Some(&own)
        })
        .collect()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Kills a process at once.
pub fn kill(pid: u32) {
    signal(pid, libc::SIGKILL);
}

fn signal(pid: u32, signal: i32) {
    // SAFETY: a plain system call on a process of this test, which was seen alive and is waited for by its parent alone.
    assert_eq!(unsafe { libc::kill(pid.cast_signed(), signal) }, 0);
}
