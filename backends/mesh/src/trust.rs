//! Who belongs to a mesh: what its key has signed, and nothing else.
//!
//! A mesh is a key pair. Whoever created it holds the secret half, and with it certifies nodes and revokes them; every member
//! holds the public half, and so can tell members from others without asking anybody.

use std::{collections::BTreeSet, marker::PhantomData};

use iroh::{EndpointId, PublicKey, SecretKey, Signature};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::codec;

/// Largest thing that is signed, in bytes.
pub const SIGNED_BYTES_MAX: usize = 1 << 20;
/// Most nodes that a mesh revokes.
pub const REVOKED_MAX: usize = 1 << 14;

/// What cannot be believed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TrustError {
    /// The signature is not that of who should have signed.
    #[error("the {what} is not signed by {whom}")]
    Signature {
        /// What was to be signed.
        what: &'static str,
        /// Who should have.
        whom: String,
    },
    /// What was signed does not read as what it should be.
    #[error("the {what} cannot be read: {why}")]
    Malformed {
        /// What it should be.
        what: &'static str,
        /// Why.
        why: String,
    },
    /// It was signed for something else.
    #[error("the {what} is that of another {of}")]
    Another {
        /// What it is.
        what: &'static str,
        /// What it is of.
        of: &'static str,
    },
    /// It was, and is not any more.
    #[error("node {node} was revoked")]
    Revoked {
        /// The node.
        node: EndpointId,
    },
}

/// Something that has a place among what is signed.
pub trait Signable: Serialize + DeserializeOwned {
    /// What it is, in words that no other kind has: a signature of one kind is none of another.
    const KIND: &'static str;
}

/// Bytes with a signature under them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(bound = "")]
pub struct Signed<T> {
    #[serde(with = "serde_bytes")]
    body: Vec<u8>,
    #[serde(with = "serde_bytes")]
    signature: Vec<u8>,
    #[serde(skip)]
    kind: PhantomData<T>,
}

impl<T: Signable> Signed<T> {
    /// Signs.
    pub fn new(key: &SecretKey, what: &T) -> Self {
        let body = codec::encode(what);
        let signature = key.sign(&message::<T>(&body)).to_bytes().to_vec();
        Self { body, signature, kind: PhantomData }
    }

    /// What was signed, if `signer` did.
    pub fn open(&self, signer: &PublicKey) -> Result<T, TrustError> {
        let forged = || TrustError::Signature { what: T::KIND, whom: signer.to_string() };
        let signature: [u8; Signature::LENGTH] = self.signature.as_slice().try_into().map_err(|_| forged())?;
        signer.verify(&message::<T>(&self.body), &Signature::from_bytes(&signature)).map_err(|_| forged())?;
        codec::decode(&self.body, SIGNED_BYTES_MAX)
            .map_err(|error| TrustError::Malformed { what: T::KIND, why: error.to_string() })
    }
}

fn message<T: Signable>(body: &[u8]) -> Vec<u8> {
    [b"mesh-llm 1\0", T::KIND.as_bytes(), b"\0", body].concat()
}

/// "This node belongs to this mesh."
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Certificate {
    /// The mesh.
    pub mesh: PublicKey,
    /// The node.
    pub node: EndpointId,
    /// When that was said, in seconds since 1970.
    pub issued_s: u64,
}

impl Signable for Certificate {
    const KIND: &'static str = "certificate";
}

/// "These nodes do not belong to this mesh any more."
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revocations {
    /// The mesh.
    pub mesh: PublicKey,
    /// Counts what was said: the latest holds all of it.
    pub serial: u64,
    /// The nodes.
    pub nodes: BTreeSet<EndpointId>,
}

impl Signable for Revocations {
    const KIND: &'static str = "list of revoked nodes";
}

/// Tells members of one mesh from everybody else.
#[derive(Clone, Debug)]
pub struct Judge {
    mesh: PublicKey,
    revocations: Option<(Revocations, Signed<Revocations>)>,
}

impl Judge {
    /// Of the mesh with that key.
    pub fn new(mesh: PublicKey) -> Self {
        Self { mesh, revocations: None }
    }

    /// The mesh.
    pub fn mesh(&self) -> PublicKey {
        self.mesh
    }

    /// Whether `node` belongs to the mesh, as `certificate` says.
    pub fn admit(&self, node: EndpointId, certificate: &Signed<Certificate>) -> Result<(), TrustError> {
        let said = certificate.open(&self.mesh)?;
        let another = |of| Err(TrustError::Another { what: Certificate::KIND, of });
        if said.mesh != self.mesh {
            return another("mesh");
        }
        if said.node != node {
            return another("node");
        }
        match self.is_revoked(&node) {
            true => Err(TrustError::Revoked { node }),
            false => Ok(()),
        }
    }

    /// Whether a node was revoked.
    pub fn is_revoked(&self, node: &EndpointId) -> bool {
        self.revocations.as_ref().is_some_and(|(said, _)| said.nodes.contains(node))
    }

    /// Takes a list of revoked nodes in, if it is a later one; gives those that were not on the last.
    pub fn revoke(&mut self, list: Signed<Revocations>) -> Result<Vec<EndpointId>, TrustError> {
        let said = list.open(&self.mesh)?;
        if said.mesh != self.mesh {
            return Err(TrustError::Another { what: Revocations::KIND, of: "mesh" });
        }
        if self.revocations.as_ref().is_some_and(|(known, _)| known.serial >= said.serial) {
            return Ok(Vec::new());
        }
        let new = said.nodes.iter().filter(|node| !self.is_revoked(node)).copied().collect();
        self.revocations = Some((said, list));
        Ok(new)
    }

    /// The latest list of revoked nodes, to be shown to others.
    pub fn revocations(&self) -> Option<&Signed<Revocations>> {
        self.revocations.as_ref().map(|(_, signed)| signed)
    }

    /// The nodes on it, and its number.
    pub fn revoked(&self) -> Option<&Revocations> {
        self.revocations.as_ref().map(|(said, _)| said)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certificate(mesh: &SecretKey, of: PublicKey, node: EndpointId) -> Signed<Certificate> {
        Signed::new(mesh, &Certificate { mesh: of, node, issued_s: 1 })
    }

    fn list(mesh: &SecretKey, serial: u64, nodes: &[EndpointId]) -> Signed<Revocations> {
        Signed::new(mesh, &Revocations { mesh: mesh.public(), serial, nodes: nodes.iter().copied().collect() })
    }

    #[test]
    fn a_member_is_who_the_mesh_says_and_nobody_else() {
        let (mesh, other) = (SecretKey::generate(), SecretKey::generate());
        let (node, stranger) = (SecretKey::generate().public(), SecretKey::generate().public());
        let judge = Judge::new(mesh.public());
        let good = certificate(&mesh, mesh.public(), node);
        assert_eq!(judge.admit(node, &good), Ok(()));
        assert!(judge.admit(stranger, &good).is_err(), "somebody else's");
        assert!(judge.admit(node, &certificate(&other, mesh.public(), node)).is_err(), "signed by another");
        assert!(judge.admit(node, &certificate(&mesh, other.public(), node)).is_err(), "of another mesh");
        for at in 0..good.body.len() {
            let mut bent = good.clone();
            bent.body[at] ^= 1;
            assert!(judge.admit(node, &bent).is_err(), "byte {at}");
        }
        let short = Signed { signature: good.signature[1..].to_vec(), ..good };
        assert!(judge.admit(node, &short).is_err());
    }

    #[test]
    fn a_signature_of_one_kind_is_none_of_another() {
        #[derive(Serialize, Deserialize)]
        struct Other(Certificate);
        impl Signable for Other {
            const KIND: &'static str = "other";
        }
        let mesh = SecretKey::generate();
        let node = SecretKey::generate().public();
        let said = Certificate { mesh: mesh.public(), node, issued_s: 1 };
        let Signed { body, signature, .. } = Signed::new(&mesh, &Other(said));
        let forged = Signed::<Certificate> { body, signature, kind: PhantomData };
        assert!(Judge::new(mesh.public()).admit(node, &forged).is_err());
    }

    #[test]
    fn the_latest_list_of_revoked_nodes_counts() {
        let mesh = SecretKey::generate();
        let [one, two] = [SecretKey::generate().public(), SecretKey::generate().public()];
        let mut judge = Judge::new(mesh.public());
        let good = certificate(&mesh, mesh.public(), one);
        assert_eq!(judge.revoke(list(&mesh, 2, &[one, two])).unwrap().len(), 2);
        assert_eq!(judge.admit(one, &good), Err(TrustError::Revoked { node: one }));
        assert_eq!(judge.revoke(list(&mesh, 1, &[])), Ok(Vec::new()), "an older list changes nothing");
        assert!(judge.is_revoked(&one));
        assert_eq!(judge.revoke(list(&mesh, 3, &[one])), Ok(Vec::new()));
        assert!(!judge.is_revoked(&two), "who was taken off it again may come again");
        assert!(judge.revoke(list(&SecretKey::generate(), 9, &[two])).is_err());
    }
}
