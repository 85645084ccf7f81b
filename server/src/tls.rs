//! TLS: a chain of certificates and its key, from files that may be replaced while the server runs.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
};

use mesh_core::Hint;
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        self, ServerConfig,
        crypto::aws_lc_rs,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    },
};

/// Longest file of certificates or of a key, in bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// What clients may choose from, the better one first.
const PROTOCOLS: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// TLS that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("{}: {error}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// A file is something else.
    #[error("{}: {what}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The two do not belong together.
    #[error("{} is not the key of the certificate in {}", key.display(), cert.display())]
    Mismatch {
        /// The certificates.
        cert: PathBuf,
        /// The key.
        key: PathBuf,
    },
}

impl Hint for TlsError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Unreadable { .. } => "check the paths given as --tls-cert and --tls-key".into(),
            Self::Malformed { .. } => {
                "--tls-cert takes PEM certificates, the server's own first, and --tls-key its private key as PEM, not encrypted"
                    .into()
            }
            Self::Mismatch { .. } => "give the key that the certificate was made for; the server's own comes first".into(),
        })
    }
}

/// The two files, and what they were when they were last read.
#[derive(Clone, Debug)]
pub struct Tls {
    cert: PathBuf,
    key: PathBuf,
    config: Arc<RwLock<Arc<ServerConfig>>>,
}

impl Tls {
    /// Reads a chain of certificates and its key.
    pub fn read(cert: PathBuf, key: PathBuf) -> Result<Self, TlsError> {
        let config = Arc::new(RwLock::new(configured(&cert, &key)?));
        Ok(Self { cert, key, config })
    }

    /// Reads both again, for connections that are yet to come. What was read before stays if that fails.
    pub fn reload(&self) -> Result<(), TlsError> {
        let config = configured(&self.cert, &self.key)?;
        *self.config.write().unwrap_or_else(PoisonError::into_inner) = config;
        Ok(())
    }

    pub(crate) fn acceptor(&self) -> TlsAcceptor {
        self.config.read().unwrap_or_else(PoisonError::into_inner).clone().into()
    }
}

fn configured(cert: &Path, key: &Path) -> Result<Arc<ServerConfig>, TlsError> {
    let malformed = |path: &Path, what: String| TlsError::Malformed { path: path.to_owned(), what };
    let text = read(cert)?;
    let chain: Vec<_> = CertificateDer::pem_slice_iter(&text)
        .collect::<Result<_, _>>()
        .map_err(|error| malformed(cert, format!("it is not PEM: {error}")))?;
    if chain.is_empty() {
        return Err(malformed(cert, "there is no certificate in it".into()));
    }
    let text = read(key)?;
    let private = PrivateKeyDer::from_pem_slice(&text).map_err(|_| {
        let encrypted = text.windows(9).any(|word| word == b"ENCRYPTED");
        let what = if encrypted { "the key is encrypted" } else { "there is no private key in it" };
        malformed(key, what.into())
    })?;
    let builder = ServerConfig::builder_with_provider(aws_lc_rs::default_provider().into())
        .with_safe_default_protocol_versions()
        .map_err(|error| malformed(cert, error.to_string()))?;
    let mut config = builder.with_no_client_auth().with_single_cert(chain, private).map_err(|error| match error {
        rustls::Error::InconsistentKeys(_) => TlsError::Mismatch { cert: cert.to_owned(), key: key.to_owned() },
        rustls::Error::InvalidCertificate(_) => malformed(cert, format!("the certificate cannot be used: {error}")),
        _ => malformed(key, format!("the key cannot be used: {error}")),
    })?;
    config.alpn_protocols = PROTOCOLS.map(Vec::from).into();
    Ok(config.into())
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    let unreadable = |error| TlsError::Unreadable { path: path.to_owned(), error };
    if fs::metadata(path).map_err(unreadable)?.len() > FILE_BYTES_MAX {
        let what = format!("the file is larger than {FILE_BYTES_MAX} bytes");
        return Err(TlsError::Malformed { path: path.to_owned(), what });
    }
    fs::read(path).map_err(unreadable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mistakes_name_the_file_and_what_is_wrong() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            fs::write(&path, text).unwrap();
            path
        };
        let pair = || rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let (one, other) = (pair(), pair());
        let cert = file("cert.pem", &one.cert.pem());
        let key = file("key.pem", &one.signing_key.serialize_pem());
        let other = file("other.pem", &other.signing_key.serialize_pem());
        let empty = file("empty.pem", "");
        let encrypted =
            file("encrypted.pem", "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n");
        let nonsense = file("nonsense.pem", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n");
        let missing = dir.path().join("missing.pem");
        let said = |cert: &Path, key: &Path| match Tls::read(cert.into(), key.into()) {
            Ok(_) => "fine".to_owned(),
            Err(error) => error.to_string().replace(&format!("{}/", dir.path().display()), ""),
        };
        assert_eq!(said(&cert, &key), "fine");
        assert_eq!(said(&cert, &other), "other.pem is not the key of the certificate in cert.pem");
        assert_eq!(said(&empty, &key), "empty.pem: there is no certificate in it");
        assert_eq!(said(&key, &key), "key.pem: there is no certificate in it");
        assert_eq!(said(&cert, &cert), "cert.pem: there is no private key in it");
        assert_eq!(said(&cert, &encrypted), "encrypted.pem: the key is encrypted");
        assert!(
            said(&nonsense, &key).starts_with("nonsense.pem: the certificate cannot be used: "),
            "{}",
            said(&nonsense, &key)
        );
        assert!(said(&missing, &key).starts_with("missing.pem: "));
        assert!(said(&cert, &missing).starts_with("missing.pem: "));
    }

    #[test]
    fn a_reload_that_fails_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (cert, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
        let write = || {
            let pair = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
            fs::write(&cert, pair.cert.pem()).unwrap();
            fs::write(&key, pair.signing_key.serialize_pem()).unwrap();
        };
        write();
        let tls = Tls::read(cert.clone(), key.clone()).unwrap();
        let before = tls.acceptor();
        fs::write(&cert, "").unwrap();
        tls.reload().unwrap_err();
        assert!(Arc::ptr_eq(before.config(), tls.acceptor().config()));
        write();
        tls.reload().unwrap();
        assert!(!Arc::ptr_eq(before.config(), tls.acceptor().config()));
    }
}
