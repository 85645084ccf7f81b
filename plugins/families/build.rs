//! A file that is added to `src` is compiled at once: nothing else names it.

fn main() {
    println!("cargo::rerun-if-changed=src");
}
