//! `cargo xtask mlx [cpu|cuda13]`: sets up MLX for building on Linux.
//!
//! mlx-sys 0.7.0's build script supports macOS only. On Linux, Cargo's override
//! for `links = "mlx"` takes its place, and this task makes what the override
//! names, all of it under `.mlx/` (git-ignored):
//!
//!   .mlx/cpu, .mlx/cuda13  the MLX wheel from PyPI: headers and libmlx.so
//!   .mlx/current           a link to the one in use
//!   .mlx/openblas          OpenBLAS, which MLX on a CPU multiplies with: see linux/compat.cpp
//!   .mlx/lib/libmlxc.so    mlx-c, compiled from the sources inside the mlx-sys
//!                          package that Cargo.lock pins
//!   .mlx/out/bindings.rs   bindgen's output for mlx-c's headers
//!   .cargo/mlx-linux.toml  the override itself
//!
//! Needs a C++20 compiler and Python 3.10+ with pip; no root, CMake or Git.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Mutex,
    thread,
};

use crate::Result;

/// Sets up MLX; `backend` is `cpu` or `cuda13`.
pub fn set_up(backend: &str) -> Result<()> {
    if !cfg!(target_os = "linux") {
        println!("nothing to do: mlx-sys builds MLX itself here");
        return Ok(());
    }
    let xtask = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let (root, recipe) = (xtask.parent().unwrap(), xtask.join("linux"));
    let prefix = root.join(".mlx");
    fs::create_dir_all(prefix.join("lib"))?;
    fs::create_dir_all(prefix.join("out"))?;

    pip_install(&recipe, &prefix, backend)?;
    pip_install(&recipe, &prefix, "openblas")?;
    let current = prefix.join("current");
    let _ = fs::remove_file(&current);
    std::os::unix::fs::symlink(backend, &current)?;

    let mlx_c = mlx_c_source(root)?;
    compile_mlx_c(&mlx_c, &recipe, &prefix)?;
    generate_bindings(&mlx_c, &recipe, &prefix)?;
    write_override(root, &mlx_c, &prefix)?;
    println!("MLX ({backend}) is set up");
    Ok(())
}

/// Installs `linux/NAME.txt` into `.mlx/NAME`, unless it is there already.
fn pip_install(recipe: &Path, prefix: &Path, name: &str) -> Result<()> {
    let requirements = recipe.join(format!("{name}.txt"));
    let wanted = fs::read_to_string(&requirements)?;
    let (target, stamp) = (prefix.join(name), prefix.join(format!("{name}.done")));
    if fs::read_to_string(&stamp).is_ok_and(|had| had == wanted) {
        return Ok(());
    }
    println!("installing {name} from PyPI");
    let _ = fs::remove_dir_all(&target);
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"])
        .args(["--root-user-action=ignore", "--no-compile", "--only-binary=:all:"])
        .arg("--target")
        .arg(&target)
        .arg("--requirement")
        .arg(&requirements);
    if wanted.contains("--hash") {
        pip.args(["--require-hashes", "--no-deps"]);
    }
    run(&mut pip)?;
    Ok(fs::write(stamp, wanted)?)
}

/// `src/mlx-c` inside the mlx-sys package that Cargo.lock pins: Cargo downloads
/// it, if need be, and checks it against the lock file.
fn mlx_c_source(root: &Path) -> Result<PathBuf> {
    let output = Command::new(env::var("CARGO").unwrap_or("cargo".into()))
        .args(["metadata", "--format-version=1", "--locked"])
        .current_dir(root)
        .stderr(Stdio::inherit())
        .output()?;
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let package = metadata["packages"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|package| package["name"] == "mlx-sys")
        .ok_or("the workspace does not depend on mlx-sys")?;
    let manifest = package["manifest_path"].as_str().ok_or("no manifest_path")?;
    Ok(Path::new(manifest).with_file_name("src").join("mlx-c"))
}

fn compile_mlx_c(mlx_c: &Path, recipe: &Path, prefix: &Path) -> Result<()> {
    let cxx = env::var("CXX").unwrap_or("c++".into());
    let library = prefix.join("lib/libmlxc.so");
    let stamp = prefix.join("lib/done");
    let wanted = format!(
        "{cxx}\n{}\n{}\n{}{}",
        mlx_c.display(),
        library.display(),
        fs::read_to_string(recipe.join("compat.h"))?,
        fs::read_to_string(recipe.join("compat.cpp"))?,
    );
    if library.exists() && fs::read_to_string(&stamp).is_ok_and(|had| had == wanted) {
        return Ok(());
    }
    println!("compiling {}", mlx_c.display());
    let objects = prefix.join("obj");
    let _ = fs::remove_dir_all(&objects);
    fs::create_dir_all(&objects)?;

    let mut sources = vec![recipe.join("compat.cpp")];
    for entry in fs::read_dir(mlx_c.join("mlx/c"))? {
        sources.push(entry?.path());
    }
    sources.retain(|path| path.extension().is_some_and(|ext| ext == "cpp"));
    let (todo, failure) = (Mutex::new(sources), Mutex::new(None));
    let worker = || {
        while let Some(source) = { todo.lock().unwrap().pop() } {
            let object = objects.join(source.file_stem().unwrap()).with_extension("o");
            let mut compile = Command::new(&cxx);
            compile
                .args(["-std=c++20", "-O2", "-fPIC", "-w", "-c", "-include"])
                .arg(recipe.join("compat.h"))
                .arg("-I")
                .arg(mlx_c)
                .arg("-I")
                .arg(prefix.join("current/mlx/include"))
                .args([&source, Path::new("-o"), &object]);
            if let Err(error) = run(&mut compile) {
                todo.lock().unwrap().clear();
                *failure.lock().unwrap() = Some(error.to_string());
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(worker);
        }
    });
    if let Some(error) = failure.into_inner()? {
        return Err(error.into());
    }

    // The soname is the library's absolute path, so that whatever links it finds
    // it without an rpath: in every binary and test, whatever RUSTFLAGS holds.
    let mut link = Command::new(&cxx);
    link.args(["-shared", "-o"])
        .arg(&library)
        .args(fs::read_dir(&objects)?.flatten().map(|entry| entry.path()))
        .arg(format!("-Wl,-soname,{}", library.display()))
        .arg("-L")
        .arg(prefix.join("current/mlx/lib"))
        .args(["-lmlx", "-ldl", "-Wl,-rpath,$ORIGIN/../current/mlx/lib"]);
    run(&mut link)?;
    Ok(fs::write(stamp, wanted)?)
}

fn generate_bindings(mlx_c: &Path, recipe: &Path, prefix: &Path) -> Result<()> {
    let mut headers_of_cc: Vec<String> = Vec::new();
    if env::var_os("LIBCLANG_PATH").is_none() {
        // PyPI's libclang comes without its own headers (stddef.h): borrow the
        // C compiler's.
        pip_install(recipe, prefix, "libclang")?;
        let output = Command::new("cc").arg("-print-file-name=include").output()?;
        headers_of_cc = vec!["-isystem".into(), String::from_utf8(output.stdout)?.trim().into()];
        // SAFETY: no other thread runs.
        unsafe { env::set_var("LIBCLANG_PATH", prefix.join("libclang/clang/native")) };
    }
    let bindings = bindgen::builder()
        .header(mlx_c.join("mlx/c/mlx.h").display().to_string())
        .clang_arg(format!("-I{}", mlx_c.display()))
        .clang_args(["-include", &recipe.join("compat.h").display().to_string()])
        .clang_args(headers_of_cc)
        .allowlist_item("_?(mlx|MLX)_.*")
        .allowlist_type("b?float16_t")
        .generate()?;
    write_if_changed(&prefix.join("out/bindings.rs"), &bindings.to_string())
}

fn write_override(root: &Path, mlx_c: &Path, prefix: &Path) -> Result<()> {
    let (arch, prefix) = (env::consts::ARCH, prefix.display());
    let text = format!(
        r#"# Written by `cargo xtask mlx`.
[target.{arch}-unknown-linux-gnu.mlx]
rustc-link-lib = ["dylib=mlxc"]
rustc-link-search = ["native={prefix}/lib"]
rustc-env = {{ OUT_DIR = "{prefix}/out" }}
include = "{prefix}/current/mlx/include:{}" # DEP_MLX_INCLUDE, as on macOS
"#,
        mlx_c.display()
    );
    write_if_changed(&root.join(".cargo/mlx-linux.toml"), &text)
}

/// Leaves an unchanged file's time alone, so that Cargo rebuilds nothing.
fn write_if_changed(path: &Path, text: &str) -> Result<()> {
    if !fs::read_to_string(path).is_ok_and(|had| had == text) {
        fs::write(path, text)?;
    }
    Ok(())
}

fn run(command: &mut Command) -> Result<()> {
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("{status}: {command:?}").into()),
        Err(error) => Err(format!("{error}: {command:?}").into()),
    }
}
