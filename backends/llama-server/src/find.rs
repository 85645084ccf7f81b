//! Where llama-server is: pure decisions over injected look-ups.

use std::{
    env,
    ffi::{OsStr, OsString},
    fmt,
    path::{Path, PathBuf},
};

/// Names the binary, before PATH is searched.
pub const ENVIRONMENT_VARIABLE: &str = "MESH_LLM_LLAMA_SERVER";

/// The binary's file name here.
pub(crate) const BINARY: &str = if cfg!(windows) { "llama-server.exe" } else { "llama-server" };

/// Who named a binary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// `path` of the settings (`--llama-server`).
    Settings,
    /// [`ENVIRONMENT_VARIABLE`].
    Environment,
    /// A directory of PATH.
    Path,
    /// The folder that [`install`](crate::install()) fills.
    Installed,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Settings => "named by --llama-server",
            Self::Environment => "named by MESH_LLM_LLAMA_SERVER",
            Self::Path => "found in PATH",
            Self::Installed => "installed by mesh-llm",
        })
    }
}

/// A binary and who named it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The binary.
    pub path: PathBuf,
    /// Who named it.
    pub origin: Origin,
}

/// A binary that was named and cannot be run. Being named wrong is an error, never a reason to look elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: not an executable file ({origin})", .path.display())]
pub struct NotExecutable {
    /// What was named.
    pub path: PathBuf,
    /// By whom.
    pub origin: Origin,
}

/// Where to look.
#[derive(Clone, Debug, Default)]
pub struct Places {
    /// `path` of the settings.
    pub settings: Option<PathBuf>,
    /// Value of [`ENVIRONMENT_VARIABLE`].
    pub environment: Option<OsString>,
    /// Value of PATH.
    pub path: Option<OsString>,
    /// Where own installations would be, best first.
    pub installed: Vec<PathBuf>,
}

impl Places {
    /// The places of this process.
    pub fn here(settings: Option<&Path>, installed: Vec<PathBuf>) -> Self {
        Self {
            settings: settings.map(Path::to_owned),
            environment: env::var_os(ENVIRONMENT_VARIABLE),
            path: env::var_os("PATH"),
            installed,
        }
    }
}

/// Looks in order: settings, environment, PATH, own installations. `Ok(None)` if it is nowhere.
pub fn find(places: &Places, is_executable: &dyn Fn(&Path) -> bool) -> Result<Option<Found>, NotExecutable> {
    let named = |path: PathBuf, origin| {
        if is_executable(&path) { Ok(Some(Found { path, origin })) } else { Err(NotExecutable { path, origin }) }
    };
    if let Some(path) = &places.settings {
        return named(path.clone(), Origin::Settings);
    }
    if let Some(path) = places.environment.as_deref().filter(|path| !path.is_empty()) {
        return named(path.into(), Origin::Environment);
    }
    let in_path = directories(places.path.as_deref()).map(|dir| (dir.join(BINARY), Origin::Path));
    let installed = places.installed.iter().map(|path| (path.clone(), Origin::Installed));
    let found = in_path.chain(installed).find(|(path, _)| is_executable(path));
    Ok(found.map(|(path, origin)| Found { path, origin }))
}

/// Relative entries are left out: what they mean depends on where one stands.
fn directories(path: Option<&OsStr>) -> impl Iterator<Item = PathBuf> {
    let all: Vec<_> = path.map(env::split_paths).into_iter().flatten().filter(|dir| dir.is_absolute()).collect();
    all.into_iter()
}

/// Whether `path` is a file that this process may run.
pub fn is_executable(path: &Path) -> bool {
    let Ok(metadata) = path.metadata() else { return false };
    #[cfg(unix)]
    let may_run = std::os::unix::fs::PermissionsExt::mode(&metadata.permissions()) & 0o111 != 0;
    #[cfg(not(unix))]
    let may_run = true;
    metadata.is_file() && may_run
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places() -> Places {
        Places {
            settings: Some("/set/llama".into()),
            environment: Some("/env/llama".into()),
            path: Some("relative:/usr/bin:/opt/bin".into()),
            installed: vec!["/own/new/llama-server".into(), "/own/old/llama-server".into()],
        }
    }

    fn all(_: &Path) -> bool {
        true
    }

    #[test]
    fn the_order_is_settings_environment_path_own() {
        let mut places = places();
        let mut origins = Vec::new();
        for forget in [
            |p: &mut Places| p.settings = None,
            |p: &mut Places| p.environment = None,
            |p: &mut Places| p.path = None,
            |p: &mut Places| p.installed.clear(),
        ] {
            let found = find(&places, &all).unwrap().unwrap();
            origins.push((found.origin, found.path));
            forget(&mut places);
        }
        let expected: [(Origin, PathBuf); 4] = [
            (Origin::Settings, "/set/llama".into()),
            (Origin::Environment, "/env/llama".into()),
            (Origin::Path, PathBuf::from("/usr/bin").join(BINARY)),
            (Origin::Installed, "/own/new/llama-server".into()),
        ];
        assert_eq!(origins, expected);
        assert_eq!(find(&places, &all), Ok(None));
    }

    #[test]
    fn a_wrong_name_is_an_error_and_not_skipped() {
        let only = |path: &Path| path.starts_with("/usr");
        let mut places = places();
        let error = find(&places, &only).unwrap_err();
        assert_eq!((error.origin, error.to_string().contains("/set/llama")), (Origin::Settings, true));
        places.settings = None;
        assert_eq!(find(&places, &only).unwrap_err().origin, Origin::Environment);
        places.environment = Some("".into());
        assert_eq!(find(&places, &only).unwrap().unwrap().origin, Origin::Path);
    }

    #[test]
    fn later_places_are_reached() {
        let mut places = Places { settings: None, environment: None, ..places() };
        let found = find(&places, &|path| path.starts_with("/opt")).unwrap().unwrap();
        assert_eq!(found.path, PathBuf::from("/opt/bin").join(BINARY));
        places.path = None;
        let found = find(&places, &|path| path.starts_with("/own/old")).unwrap().unwrap();
        assert_eq!(found.path, PathBuf::from("/own/old/llama-server"));
    }
}
