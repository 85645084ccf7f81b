//! What a node keeps on disk of itself and its mesh. Files with keys are for their owner's eyes only.
//!
//! The running server and the commands beside it share the directory: what changes is written whole and renamed, under a lock,
//! and read again when it is needed.

use std::{
    collections::BTreeSet,
    fs::{self, File, OpenOptions},
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use base64::{Engine, prelude::BASE64_STANDARD_NO_PAD};
use iroh::{EndpointAddr, EndpointId, PublicKey, SecretKey};
use mesh_core::Hint;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use sha2::{Digest, Sha256};

use crate::{
    codec,
    ticket::Ticket,
    trust::{Certificate, REVOKED_MAX, Revocations, Signed},
};

/// Largest file that is read, in bytes.
const FILE_BYTES_MAX: u64 = 4 << 20;
/// Invitations that are open at the same time.
const INVITES_MAX: usize = 1 << 10;
/// Addresses of others that are remembered.
const PEERS_MAX: usize = 256;

const NODE_KEY: &str = "node.key";
const MESH_KEY: &str = "mesh.key";
const MEMBERSHIP: &str = "membership.json";
const INVITES: &str = "invites.json";
const REVOKED: &str = "revoked.cbor";
const ADDRESS: &str = "address.json";
const PEERS: &str = "peers.json";
const LOCK: &str = "lock";

/// What went wrong with a node's files, or with what was asked of them.
#[derive(Debug, thiserror::Error)]
pub enum HomeError {
    /// A file cannot be read or written.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file does not hold what it should.
    #[error("{} is damaged: {what}", .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// How.
        what: String,
    },
    /// A mesh was to be created or joined, and this node is in one.
    #[error("this node is in the mesh `{mesh}` already")]
    Member {
        /// Its name.
        mesh: String,
    },
    /// Something was asked that takes a mesh.
    #[error("this node is in no mesh")]
    NoMesh,
    /// Something was asked that takes the mesh's key.
    #[error("only the node that created the mesh can do that: it holds the mesh's key")]
    NotTheCreator,
    /// The creator leaves.
    #[error(
        "this node created the mesh `{mesh}` and holds its key; without it nobody can be invited or revoked any more"
    )]
    Creator {
        /// The mesh's name.
        mesh: String,
    },
    /// As many invitations are open as may be.
    #[error("{INVITES_MAX} invitations are open, which is the most")]
    TooManyInvites,
    /// As many nodes were revoked as may be.
    #[error("{REVOKED_MAX} nodes are revoked, which is the most")]
    TooManyRevoked,
    /// The machine has no place for such files.
    #[error("no directory for the mesh's files is known on this machine")]
    Nowhere,
}

impl Hint for HomeError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Io { .. } => "check who owns the directory, or choose another with MESH_LLM_MESH_DIR".into(),
            Self::Damaged { .. } => "restore it from a backup, or remove it to begin anew".into(),
            Self::Member { .. } => "run: mesh-llm mesh leave".into(),
            Self::NoMesh => "run: mesh-llm mesh create, or mesh-llm serve --join TICKET".into(),
            Self::NotTheCreator => "run it there".into(),
            Self::Creator { .. } => "to give the key up for good, run: mesh-llm mesh leave --forget-key".into(),
            Self::TooManyInvites => "wait until some expire".into(),
            Self::TooManyRevoked => "create a new mesh, and invite those who shall be in it".into(),
            Self::Nowhere => "set MESH_LLM_MESH_DIR".into(),
        })
    }
}

/// A node's place in a mesh.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    /// The mesh's public key.
    pub mesh: PublicKey,
    /// The mesh's name, for people.
    pub mesh_name: String,
    /// What members know and nobody else does: nodes show one another that they do before they say anything.
    pub secret: Secret,
    /// What proves it.
    pub certificate: Signed<Certificate>,
}

/// What all members of a mesh know.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Secret([u8; 32]);

impl Secret {
    /// Bytes that only who knows it can make of `what`, for one `purpose` and no other.
    pub fn derive(&self, purpose: &str, what: &[u8]) -> [u8; 32] {
        let key = blake3::derive_key(purpose, &self.0);
        *blake3::keyed_hash(&key, what).as_bytes()
    }

    /// What those look for on a network who look for this mesh. Tells nobody else which one it is.
    pub fn tag(&self) -> String {
        let tag = self.derive("mesh-llm 1 name on local networks", b"");
        format!("mesh-llm-{}", tag[..5].iter().map(|byte| format!("{byte:02x}")).collect::<String>())
    }
}

/// It is a secret.
impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret")
    }
}

/// An invitation as its writer remembers it: not its secret, but a hash.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Invite {
    hash: String,
    expires_s: u64,
    once: bool,
    /// The nodes that used it.
    #[serde(default)]
    used_by: BTreeSet<EndpointId>,
}

/// Why somebody is not let in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum Denied {
    /// The secret is nobody's.
    #[error("the ticket is not one of this mesh's, or has expired")]
    Unknown,
    /// It was for one node, and another one has used it.
    #[error("the ticket was for one node, which has used it")]
    Used,
    /// The node was revoked.
    #[error("this node was revoked")]
    Revoked,
    /// The node that was asked cannot tell.
    #[error("the node that was asked does not hold the mesh's key, or cannot read it")]
    Unable,
}

/// The directory.
#[derive(Clone, Debug)]
pub struct Home {
    directory: PathBuf,
}

impl Home {
    /// `MESH_LLM_MESH_DIR`, or the user's data directory.
    pub fn usual() -> Result<Self, HomeError> {
        let named = std::env::var_os("MESH_LLM_MESH_DIR").filter(|named| !named.is_empty()).map(PathBuf::from);
        let usual = || dirs::data_dir().map(|data| data.join("mesh-llm").join("mesh"));
        named.or_else(usual).map(Self::at).ok_or(HomeError::Nowhere)
    }

    /// A directory of one's own.
    pub fn at(directory: impl Into<PathBuf>) -> Self {
        Self { directory: directory.into() }
    }

    /// The node's key: made when it is first asked for.
    pub fn node_key(&self) -> Result<SecretKey, HomeError> {
        let _lock = self.lock()?;
        match self.key(NODE_KEY)? {
            Some(key) => Ok(key),
            None => {
                let key = SecretKey::generate();
                self.write(NODE_KEY, key_text(&key).as_bytes())?;
                Ok(key)
            }
        }
    }

    /// The mesh that this node is in.
    pub fn membership(&self) -> Result<Option<Membership>, HomeError> {
        self.read_json(MEMBERSHIP)
    }

    /// The mesh's key, where this node created it.
    pub fn mesh_key(&self) -> Result<Option<SecretKey>, HomeError> {
        self.key(MESH_KEY)
    }

    /// Creates a mesh, and makes this node its first member.
    pub fn create(&self, mesh_name: &str) -> Result<Membership, HomeError> {
        let node = self.node_key()?.public();
        let _lock = self.lock()?;
        self.in_none()?;
        let key = SecretKey::generate();
        self.write(MESH_KEY, key_text(&key).as_bytes())?;
        let membership = Membership {
            mesh: key.public(),
            mesh_name: mesh_name.to_owned(),
            secret: Secret(rand::random()),
            certificate: certify(&key, node, SystemTime::now()),
        };
        self.write_json(MEMBERSHIP, &membership)?;
        Ok(membership)
    }

    /// Remembers a mesh that let this node in.
    pub fn join(&self, membership: &Membership) -> Result<(), HomeError> {
        let _lock = self.lock()?;
        self.in_none()?;
        self.write_json(MEMBERSHIP, membership)
    }

    fn in_none(&self) -> Result<(), HomeError> {
        match self.membership()? {
            Some(membership) => Err(HomeError::Member { mesh: membership.mesh_name }),
            None => Ok(()),
        }
    }

    /// Forgets the mesh. The node's own key stays. Who holds the mesh's key has to say that it may be forgotten.
    pub fn leave(&self, forget_key: bool) -> Result<Membership, HomeError> {
        let _lock = self.lock()?;
        let membership = self.membership()?.ok_or(HomeError::NoMesh)?;
        if self.mesh_key()?.is_some() && !forget_key {
            return Err(HomeError::Creator { mesh: membership.mesh_name });
        }
        // The membership first: should the rest fail, the node is out all the same.
        for name in [MEMBERSHIP, MESH_KEY, INVITES, REVOKED, PEERS, ADDRESS] {
            let path = self.directory.join(name);
            match fs::remove_file(&path) {
                Err(source) if source.kind() != ErrorKind::NotFound => return Err(HomeError::Io { path, source }),
                _ => {}
            }
        }
        Ok(membership)
    }

    /// Writes an invitation that is good for `lasting`, for as many nodes as want to, or for one.
    pub fn invite(&self, at: EndpointAddr, lasting: Duration, once: bool) -> Result<Ticket, HomeError> {
        let _lock = self.lock()?;
        let own = self.membership()?.ok_or(HomeError::NoMesh)?;
        let key = self.mesh_key()?.ok_or(HomeError::NotTheCreator)?;
        let now = seconds(SystemTime::now());
        let mut invites = self.invites(now)?;
        if invites.len() >= INVITES_MAX {
            return Err(HomeError::TooManyInvites);
        }
        let (secret, expires_s) = (rand::random::<[u8; 16]>(), now.saturating_add(lasting.as_secs()));
        invites.push(Invite { hash: hash(&secret), expires_s, once, used_by: BTreeSet::new() });
        self.write_json(INVITES, &invites)?;
        Ok(Ticket::new(key.public(), at, own.secret.tag(), secret, expires_s))
    }

    /// Lets a node in that shows a ticket's secret.
    pub fn redeem(&self, secret: &[u8; 16], node: EndpointId, now: SystemTime) -> Result<Membership, Denied> {
        let unable = |error: HomeError| {
            tracing::error!(%error, "a node that wanted to join could not be let in");
            Denied::Unable
        };
        let _lock = self.lock().map_err(unable)?;
        let own = self.membership().map_err(unable)?.ok_or(Denied::Unable)?;
        let key = self.mesh_key().map_err(unable)?.ok_or(Denied::Unable)?;
        if self.revoked_by(&key).map_err(unable)?.nodes.contains(&node) {
            return Err(Denied::Revoked);
        }
        let mut invites = self.invites(seconds(now)).map_err(unable)?;
        let hash = hash(secret);
        let invite = invites.iter_mut().find(|invite| invite.hash == hash).ok_or(Denied::Unknown)?;
        // Who was let in and lost the answer may ask again.
        if invite.once && !invite.used_by.is_empty() && !invite.used_by.contains(&node) {
            return Err(Denied::Used);
        }
        invite.used_by.insert(node);
        self.write_json(INVITES, &invites).map_err(unable)?;
        Ok(Membership { certificate: certify(&key, node, now), ..own })
    }

    /// Invitations that are still good.
    fn invites(&self, now_s: u64) -> Result<Vec<Invite>, HomeError> {
        let mut invites: Vec<Invite> = self.read_json(INVITES)?.unwrap_or_default();
        invites.retain(|invite| invite.expires_s > now_s);
        Ok(invites)
    }

    /// Revokes a node, for good: it is told to all.
    pub fn revoke(&self, node: EndpointId) -> Result<Signed<Revocations>, HomeError> {
        let _lock = self.lock()?;
        self.membership()?.ok_or(HomeError::NoMesh)?;
        let key = self.mesh_key()?.ok_or(HomeError::NotTheCreator)?;
        let mut revoked = self.revoked_by(&key)?;
        if revoked.nodes.len() >= REVOKED_MAX {
            return Err(HomeError::TooManyRevoked);
        }
        revoked.nodes.insert(node);
        revoked.serial += 1;
        let signed = Signed::new(&key, &revoked);
        self.write(REVOKED, &codec::encode(&signed))?;
        Ok(signed)
    }

    /// The list as its signer continues it.
    fn revoked_by(&self, key: &SecretKey) -> Result<Revocations, HomeError> {
        let none = Revocations { mesh: key.public(), serial: 0, nodes: BTreeSet::new() };
        let Some(signed) = self.revocations()? else { return Ok(none) };
        let damaged = |error: crate::trust::TrustError| self.damaged(REVOKED, error.to_string());
        signed.open(&key.public()).map_err(damaged)
    }

    /// The latest list of revoked nodes that this node has seen.
    pub fn revocations(&self) -> Result<Option<Signed<Revocations>>, HomeError> {
        let Some(bytes) = self.read(REVOKED)? else { return Ok(None) };
        let list = codec::decode(&bytes, FILE_BYTES_MAX as usize);
        list.map(Some).map_err(|error| self.damaged(REVOKED, error.to_string()))
    }

    /// Remembers a list that another node has shown.
    pub fn remember_revocations(&self, list: &Signed<Revocations>) -> Result<(), HomeError> {
        let _lock = self.lock()?;
        self.write(REVOKED, &codec::encode(list))
    }

    /// Where this node can be reached, as its running server last said.
    pub fn address(&self) -> Result<Option<EndpointAddr>, HomeError> {
        self.read_json(ADDRESS)
    }

    /// Says where this node can be reached, for commands that write tickets.
    pub fn remember_address(&self, address: &EndpointAddr) -> Result<(), HomeError> {
        let _lock = self.lock()?;
        self.write_json(ADDRESS, address)
    }

    /// Where others were last.
    pub fn peers(&self) -> Result<Vec<EndpointAddr>, HomeError> {
        Ok(self.read_json(PEERS)?.unwrap_or_default())
    }

    /// Remembers where others are, as many as are worth it.
    pub fn remember_peers(&self, peers: &[EndpointAddr]) -> Result<(), HomeError> {
        let _lock = self.lock()?;
        self.write_json(PEERS, &peers[..peers.len().min(PEERS_MAX)])
    }

    fn key(&self, name: &str) -> Result<Option<SecretKey>, HomeError> {
        let Some(bytes) = self.read(name)? else { return Ok(None) };
        let key = BASE64_STANDARD_NO_PAD.decode(bytes.trim_ascii()).ok().and_then(|key| key.try_into().ok());
        let key: [u8; 32] = key.ok_or_else(|| self.damaged(name, "it holds no key".into()))?;
        Ok(Some(SecretKey::from_bytes(&key)))
    }

    fn damaged(&self, name: &str, what: String) -> HomeError {
        HomeError::Damaged { path: self.directory.join(name), what }
    }

    fn read_json<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, HomeError> {
        let Some(bytes) = self.read(name)? else { return Ok(None) };
        serde_json::from_slice(&bytes).map(Some).map_err(|error| self.damaged(name, error.to_string()))
    }

    fn write_json(&self, name: &str, value: &(impl Serialize + ?Sized)) -> Result<(), HomeError> {
        let text = serde_json::to_vec_pretty(value).map_err(|error| self.damaged(name, error.to_string()))?;
        self.write(name, &text)
    }

    fn read(&self, name: &str) -> Result<Option<Vec<u8>>, HomeError> {
        let path = self.directory.join(name);
        let io = |source| HomeError::Io { path: path.clone(), source };
        match fs::metadata(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Ok(metadata) if metadata.len() > FILE_BYTES_MAX => {
                return Err(self.damaged(name, format!("it has {} bytes", metadata.len())));
            }
            _ => {}
        }
        match fs::read(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            read => read.map(Some).map_err(io),
        }
    }

    /// Whole or not at all, and readable for its owner alone, as temporary files are.
    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), HomeError> {
        let path = self.directory.join(name);
        let io = |source| HomeError::Io { path: path.clone(), source };
        let mut file = tempfile::NamedTempFile::new_in(&self.directory).map_err(io)?;
        file.write_all(bytes).and_then(|()| file.as_file().sync_all()).map_err(io)?;
        file.persist(&path).map_err(|error| io(error.error))?;
        Ok(())
    }

    /// Nobody else writes as long as this is held.
    fn lock(&self) -> Result<File, HomeError> {
        let io = |path: &Path| {
            let path = path.to_owned();
            move |source| HomeError::Io { path, source }
        };
        private_directory(&self.directory).map_err(io(&self.directory))?;
        let path = self.directory.join(LOCK);
        let file = OpenOptions::new().create(true).write(true).truncate(false).open(&path).map_err(io(&path))?;
        file.lock().map_err(io(&path))?;
        Ok(file)
    }
}

fn private_directory(directory: &Path) -> std::io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(directory)
}

fn certify(key: &SecretKey, node: EndpointId, now: SystemTime) -> Signed<Certificate> {
    Signed::new(key, &Certificate { mesh: key.public(), node, issued_s: seconds(now) })
}

fn key_text(key: &SecretKey) -> String {
    BASE64_STANDARD_NO_PAD.encode(key.to_bytes()) + "\n"
}

fn hash(secret: &[u8; 16]) -> String {
    Sha256::digest(secret).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trust::Judge;

    const HOUR: Duration = Duration::from_secs(60 * 60);

    fn home() -> (tempfile::TempDir, Home) {
        let root = tempfile::tempdir().unwrap();
        let home = Home::at(root.path().join("mesh"));
        (root, home)
    }

    fn secret(ticket: &Ticket) -> [u8; 16] {
        ticket.secret
    }

    fn someone() -> EndpointId {
        SecretKey::generate().public()
    }

    fn here(home: &Home) -> EndpointAddr {
        EndpointAddr::new(home.node_key().unwrap().public())
    }

    #[test]
    fn who_creates_a_mesh_is_its_first_member() {
        let (_root, home) = home();
        assert_eq!(home.membership().unwrap(), None);
        assert!(matches!(home.invite(here(&home), HOUR, false), Err(HomeError::NoMesh)));
        let membership = home.create("home").unwrap();
        assert_eq!(home.membership().unwrap().as_ref(), Some(&membership));
        let node = home.node_key().unwrap().public();
        Judge::new(membership.mesh).admit(node, &membership.certificate).unwrap();
        assert!(matches!(home.create("again"), Err(HomeError::Member { mesh }) if mesh == "home"));
        assert!(matches!(home.leave(false), Err(HomeError::Creator { .. })));
        home.leave(true).unwrap();
        assert_eq!(home.membership().unwrap(), None);
        assert_eq!(home.node_key().unwrap().public(), node, "the node stays who it is");
        assert!(matches!(home.leave(true), Err(HomeError::NoMesh)));
    }

    #[test]
    fn a_ticket_lets_in_as_often_and_as_long_as_it_says() {
        let (_root, home) = home();
        home.create("home").unwrap();
        let now = SystemTime::now();
        let many = secret(&home.invite(here(&home), HOUR, false).unwrap());
        let once = secret(&home.invite(here(&home), HOUR, true).unwrap());
        let (one, two) = (someone(), someone());
        let membership = home.redeem(&many, one, now).unwrap();
        Judge::new(membership.mesh).admit(one, &membership.certificate).unwrap();
        home.redeem(&many, two, now).unwrap();
        home.redeem(&once, one, now).unwrap();
        home.redeem(&once, one, now).expect("it may have missed the answer");
        assert_eq!(home.redeem(&once, two, now), Err(Denied::Used));
        assert_eq!(home.redeem(&[0; 16], two, now), Err(Denied::Unknown));
        assert_eq!(home.redeem(&many, two, now + HOUR), Err(Denied::Unknown), "it has expired");
        assert_eq!(Home::at("/nonexistent/x").redeem(&many, two, now), Err(Denied::Unable));
    }

    #[test]
    fn who_was_revoked_is_not_let_in_again() {
        let (_root, home) = home();
        let mesh = home.create("home").unwrap().mesh;
        let ticket = secret(&home.invite(here(&home), HOUR, false).unwrap());
        let (one, two) = (someone(), someone());
        let certificate = home.redeem(&ticket, one, SystemTime::now()).unwrap().certificate;
        home.revoke(two).unwrap();
        let list = home.revoke(one).unwrap();
        let mut judge = Judge::new(mesh);
        judge.admit(one, &certificate).unwrap();
        assert_eq!(judge.revoke(list.clone()).unwrap().len(), 2);
        assert!(judge.admit(one, &certificate).is_err());
        assert_eq!(home.redeem(&ticket, one, SystemTime::now()), Err(Denied::Revoked));
        assert_eq!(home.revocations().unwrap(), Some(list));
    }

    #[test]
    fn members_without_the_key_invite_and_revoke_nobody() {
        let ((_one, creator), (_two, member)) = (home(), home());
        creator.create("home").unwrap();
        let ticket = secret(&creator.invite(here(&creator), HOUR, true).unwrap());
        let node = member.node_key().unwrap().public();
        member.join(&creator.redeem(&ticket, node, SystemTime::now()).unwrap()).unwrap();
        assert!(matches!(member.invite(here(&member), HOUR, false), Err(HomeError::NotTheCreator)));
        assert!(matches!(member.revoke(someone()), Err(HomeError::NotTheCreator)));
        assert_eq!(member.redeem(&ticket, someone(), SystemTime::now()), Err(Denied::Unable));
        member.leave(false).unwrap();
    }

    #[cfg(unix)]
    #[test]
    fn files_are_for_their_owner() {
        use std::os::unix::fs::PermissionsExt;
        let (_root, home) = home();
        home.create("home").unwrap();
        home.invite(here(&home), HOUR, false).unwrap();
        home.revoke(someone()).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&home.directory), 0o700);
        for name in [NODE_KEY, MESH_KEY, MEMBERSHIP, INVITES, REVOKED] {
            assert_eq!(mode(&home.directory.join(name)), 0o600, "{name}");
        }
    }

    #[test]
    fn damage_is_said_with_the_file() {
        let (_root, home) = home();
        home.create("home").unwrap();
        for (name, content) in [(NODE_KEY, "abc"), (MEMBERSHIP, "{"), (REVOKED, "x")] {
            fs::write(home.directory.join(name), content).unwrap();
        }
        let said = [home.node_key().unwrap_err(), home.membership().unwrap_err(), home.revocations().unwrap_err()];
        for (error, name) in said.iter().zip([NODE_KEY, MEMBERSHIP, REVOKED]) {
            assert!(error.to_string().contains(name) && error.to_string().contains("damaged"), "{error}");
        }
    }
}
