//! One child process: started so that it cannot outlive us, watched, and ended.
//!
//! Only the watcher task signals the child, and only before it has waited for it, so that a signal never reaches another
//! process that took over its id.

use std::{
    ffi::OsString,
    io,
    path::PathBuf,
    process::{ExitStatus, Stdio},
    sync::{OnceLock, mpsc as std_mpsc},
    time::Duration,
};

use tokio::{
    process::{Child, Command},
    runtime::Handle,
    sync::{mpsc, oneshot, watch},
    time::timeout,
};

use crate::log::{self, Tail};

/// How long the child's last words are waited for once it is gone.
const LAST_WORDS_MAX: Duration = Duration::from_secs(1);

/// What to run.
#[derive(Debug)]
pub(crate) struct Program {
    /// The binary.
    pub binary: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// Variables set on top of ours.
    pub environment: Vec<(&'static str, String)>,
}

/// A running child. Dropping it kills the child.
#[derive(Debug)]
pub(crate) struct Process {
    /// Its id; of use to people, and to tests.
    pub pid: u32,
    /// What it wrote last.
    pub tail: Tail,
    ended: watch::Receiver<Option<Ended>>,
    orders: mpsc::Sender<Order>,
}

/// How a child ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ended {
    /// Exit status, for people.
    pub status: String,
    /// The processor lacks an instruction that the binary uses.
    pub illegal_instruction: bool,
}

#[derive(Debug)]
enum Order {
    /// Ask it to end, and kill it if it has not after this long.
    Stop(Duration),
}

impl Process {
    /// Starts `program`. Has to be called inside a tokio runtime.
    pub async fn start(program: Program) -> io::Result<Self> {
        let mut child = spawn(program).await?;
        let pid = child.id().ok_or_else(|| io::Error::other("the child ended before it had an id"))?;
        let tail = Tail::default();
        let mut readers = tokio::task::JoinSet::new();
        if let Some(stdout) = child.stdout.take() {
            readers.spawn(log::drain(stdout, tail.clone()));
        }
        if let Some(stderr) = child.stderr.take() {
            readers.spawn(log::drain(stderr, tail.clone()));
        }
        #[cfg(not(target_os = "linux"))]
        let watchdog = watchdog(pid)?;
        let (orders, order) = mpsc::channel(1);
        let (report, ended) = watch::channel(None);
        tokio::spawn(async move {
            let status = watch_over(child, pid, order).await;
            #[cfg(not(target_os = "linux"))]
            drop(watchdog);
            // A grandchild could hold the pipes open for ever.
            let _ = timeout(LAST_WORDS_MAX, async { while readers.join_next().await.is_some() {} }).await;
            report.send_replace(Some(describe(status)));
        });
        Ok(Self { pid, tail, ended, orders })
    }

    /// Waits until it ended and its last lines are in.
    pub fn ended(&self) -> impl Future<Output = Ended> + Send + 'static {
        let mut ended = self.ended.clone();
        async move {
            let lost = || Ended { status: "an unknown status".into(), illegal_instruction: false };
            match ended.wait_for(Option::is_some).await {
                Ok(ended) => ended.clone().unwrap_or_else(lost),
                Err(_) => lost(),
            }
        }
    }

    /// Asks it to end, kills it if it has not after `patience`, and returns when it is gone.
    pub async fn stop(&self, patience: Duration) {
        // A full channel means that it has been told already, a closed one that it is gone.
        let _ = self.orders.try_send(Order::Stop(patience));
        self.ended().await;
    }
}

/// Waits for the child, and ends it when told to or when nobody holds the process any more.
async fn watch_over(mut child: Child, pid: u32, mut orders: mpsc::Receiver<Order>) -> io::Result<ExitStatus> {
    let order = tokio::select! {
        status = child.wait() => return status,
        order = orders.recv() => order,
    };
    if let Some(Order::Stop(patience)) = order {
        signal_group(pid, libc::SIGTERM);
        let dropped = async { while orders.recv().await.is_some() {} };
        tokio::select! {
            status = child.wait() => return status,
            () = tokio::time::sleep(patience) => tracing::warn!(pid, "llama-server did not end in time and is killed"),
            () = dropped => {}
        }
    }
    signal_group(pid, libc::SIGKILL);
    child.wait().await
}

fn signal_group(pid: u32, signal: libc::c_int) {
    if let Ok(group) = libc::pid_t::try_from(pid) {
        // SAFETY: a plain system call; the group's leader has not been waited for, so its id is still taken.
        unsafe { libc::kill(-group, signal) };
    }
}

fn describe(status: io::Result<ExitStatus>) -> Ended {
    use std::os::unix::process::ExitStatusExt;
    let Ok(status) = status else {
        return Ended { status: "a status that cannot be told".into(), illegal_instruction: false };
    };
    Ended {
        status: match (status.code(), status.signal()) {
            (Some(code), _) => format!("exit status {code}"),
            (None, Some(signal)) => match signal_name(signal) {
                Some(name) => format!("signal {signal} ({name})"),
                None => format!("signal {signal}"),
            },
            (None, None) => status.to_string(),
        },
        illegal_instruction: status.signal() == Some(libc::SIGILL),
    }
}

fn signal_name(signal: libc::c_int) -> Option<&'static str> {
    Some(match signal {
        libc::SIGHUP => "SIGHUP",
        libc::SIGINT => "SIGINT",
        libc::SIGILL => "SIGILL",
        libc::SIGABRT => "SIGABRT",
        libc::SIGBUS => "SIGBUS",
        libc::SIGFPE => "SIGFPE",
        libc::SIGKILL => "SIGKILL",
        libc::SIGSEGV => "SIGSEGV",
        libc::SIGTERM => "SIGTERM",
        _ => return None,
    })
}

type Request = (Program, Handle, oneshot::Sender<io::Result<Child>>);

/// Starts the child from one thread that lives as long as this process. `PR_SET_PDEATHSIG` fires when the *thread* that
/// forked ends, and the runtime's threads do end before the process does.
async fn spawn(program: Program) -> io::Result<Child> {
    static SPAWNER: OnceLock<Result<std_mpsc::Sender<Request>, io::ErrorKind>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (send, requests) = std_mpsc::channel::<Request>();
        let thread = std::thread::Builder::new().name("llama-spawn".into()).spawn(move || {
            for (program, runtime, reply) in requests {
                let _inside = runtime.enter();
                // If nobody waits any more the child is dropped, which kills it.
                let _ = reply.send(spawn_here(program));
            }
        });
        thread.map(|_| send).map_err(|error| error.kind())
    });
    let gone = || io::Error::other("the thread that starts processes is gone");
    let (reply, answer) = oneshot::channel();
    let spawner = spawner.as_ref().map_err(|kind| io::Error::from(*kind))?;
    spawner.send((program, Handle::current(), reply)).map_err(|_| gone())?;
    answer.await.map_err(|_| gone())?
}

fn spawn_here(program: Program) -> io::Result<Child> {
    let mut command = Command::new(&program.binary);
    command.args(&program.arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // A group of its own, so that Ctrl-C at the terminal reaches us alone and requests can be drained.
    command.kill_on_drop(true).process_group(0);
    for (name, _) in std::env::vars_os().filter(|(name, _)| is_not_for_it(&name.to_string_lossy())) {
        command.env_remove(name);
    }
    command.envs(program.environment.iter().map(|(name, value)| (name, value)));
    #[cfg(target_os = "linux")]
    die_with_us(&mut command);
    command.spawn()
}

/// Settings that would work against ours, and secrets that are not the child's business: our API keys, the hub's tokens.
fn is_not_for_it(variable: &str) -> bool {
    ["LLAMA_", "MESH_LLM_"].iter().any(|start| variable.starts_with(start))
        || ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"].contains(&variable)
}

/// Has the kernel kill the child when we are gone, however we went.
#[cfg(target_os = "linux")]
fn die_with_us(command: &mut Command) {
    let us = std::process::id();
    // SAFETY: between fork and exec only system calls are made.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong, 0, 0, 0) != 0 {
                return Err(io::Error::last_os_error());
            }
            // We may have died before the call above took effect.
            if libc::getppid().cast_unsigned() == us { Ok(()) } else { Err(io::ErrorKind::BrokenPipe.into()) }
        });
    }
}

/// The stand-in where the kernel has no such call: a shell that waits for the end of a pipe which only we hold open, and
/// then kills the child's group. However we end, the kernel closes our end of the pipe. The shell itself ends when the
/// returned handle is dropped.
#[cfg(any(test, not(target_os = "linux")))]
fn watchdog(pid: u32) -> io::Result<Child> {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "read -r _; kill -KILL -\"$1\"", "sh", &pid.to_string()]);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    command.process_group(0).kill_on_drop(true).spawn()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    fn sh(script: &str) -> Program {
        let arguments = vec!["-c".into(), script.into()];
        Program { binary: "/bin/sh".into(), arguments, environment: vec![("LLAMA_API_KEY", "secret".into())] }
    }

    fn alive(pid: u32) -> bool {
        // SAFETY: a plain system call; signal 0 only asks.
        unsafe { libc::kill(pid.cast_signed(), 0) == 0 }
    }

    #[tokio::test]
    async fn status_and_last_words_are_kept() {
        let process = Process::start(sh("echo out; echo err >&2; echo $LLAMA_API_KEY; exit 7")).await.unwrap();
        assert_eq!(process.ended().await.status, "exit status 7");
        for word in ["out", "err", "secret"] {
            assert!(process.tail.contains(word), "{}", process.tail.last(9));
        }
        let process = Process::start(sh("kill -ILL $$")).await.unwrap();
        let ended = process.ended().await;
        assert!(ended.illegal_instruction && ended.status == "signal 4 (SIGILL)", "{ended:?}");
    }

    #[test]
    fn secrets_are_kept_from_the_child() {
        for name in ["LLAMA_ARG_MODEL", "MESH_LLM_API_KEYS", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"] {
            assert!(is_not_for_it(name), "{name}");
        }
        for name in ["PATH", "CUDA_VISIBLE_DEVICES", "HF_HOME", "GGML_CUDA_FORCE_MMQ"] {
            assert!(!is_not_for_it(name), "{name}");
        }
    }

    #[tokio::test]
    async fn stop_asks_first_and_then_insists() {
        let process = Process::start(sh("trap 'exit 3' TERM; echo ready; while :; do sleep 0.05; done")).await.unwrap();
        while !process.tail.contains("ready") {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        process.stop(Duration::from_secs(20)).await;
        assert_eq!(process.ended().await.status, "exit status 3");

        let process = Process::start(sh("trap '' TERM; echo ready; while :; do sleep 0.05; done")).await.unwrap();
        while !process.tail.contains("ready") {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        process.stop(Duration::from_millis(100)).await;
        assert_eq!(process.ended().await.status, "signal 9 (SIGKILL)");
    }

    #[tokio::test]
    async fn dropping_kills() {
        let process = Process::start(sh("while :; do sleep 1; done")).await.unwrap();
        let (pid, ended, start) = (process.pid, process.ended(), Instant::now());
        drop(process);
        assert_eq!(ended.await.status, "signal 9 (SIGKILL)");
        assert!(!alive(pid) && start.elapsed() < Duration::from_secs(5));
    }

    #[tokio::test]
    async fn the_watchdog_kills_once_its_pipe_closes() {
        let process = Process::start(sh("while :; do sleep 1; done")).await.unwrap();
        let mut dog = watchdog(process.pid).unwrap();
        drop(dog.stdin.take());
        assert_eq!(process.ended().await.status, "signal 9 (SIGKILL)");
        dog.wait().await.unwrap();
    }

    #[tokio::test]
    async fn a_missing_binary_is_an_error() {
        let program = Program { binary: "/no/such/binary".into(), ..sh("") };
        assert_eq!(Process::start(program).await.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
