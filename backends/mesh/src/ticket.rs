//! What is handed to a machine that shall join: one line of text.

use std::{fmt, str::FromStr};

use iroh::{EndpointAddr, PublicKey};
use iroh_tickets::{ParseError, Ticket as Encoding};
use serde::{Deserialize, Serialize};

use crate::codec;

/// Longest ticket that is read, in bytes.
const TICKET_BYTES_MAX: usize = 4 << 10;
const VERSION: u32 = 1;

/// An invitation to a mesh. Whoever holds it may use it, as often and as long as who wrote it allows.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ticket {
    /// Of this form.
    pub version: u32,
    /// The mesh.
    pub mesh: PublicKey,
    /// The node that lets others in, and where it was last.
    pub at: EndpointAddr,
    /// What to look for on a local network, should it be elsewhere by now.
    pub tag: String,
    /// What it is told.
    pub secret: [u8; 16],
    /// When that is over, in seconds since 1970.
    pub expires_s: u64,
}

/// A text that is no ticket.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this is no ticket of `mesh-llm mesh invite`: {what}")]
pub struct TicketError {
    what: String,
}

impl Ticket {
    /// For `mesh`, to be used at `at`.
    pub fn new(mesh: PublicKey, at: EndpointAddr, tag: String, secret: [u8; 16], expires_s: u64) -> Self {
        Self { version: VERSION, mesh, at, tag, secret, expires_s }
    }
}

impl Encoding for Ticket {
    const KIND: &'static str = "mesh-";

    fn encode_bytes(&self) -> Vec<u8> {
        codec::encode(self)
    }

    fn decode_bytes(bytes: &[u8]) -> Result<Self, ParseError> {
        let ticket: Self = codec::decode(bytes, TICKET_BYTES_MAX)
            .map_err(|_| ParseError::verification_failed("it is cut off or not whole"))?;
        match ticket.version {
            VERSION => Ok(ticket),
            _ => Err(ParseError::verification_failed("it was written by a newer mesh-llm")),
        }
    }
}

impl fmt::Display for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.encode_string())
    }
}

/// Not its secret.
impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ticket").field("mesh", &self.mesh).field("at", &self.at).finish_non_exhaustive()
    }
}

impl FromStr for Ticket {
    type Err = TicketError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.len() > 2 * TICKET_BYTES_MAX {
            return Err(TicketError { what: format!("it has {} characters", text.len()) });
        }
        Self::decode_string(text.trim()).map_err(|error| TicketError { what: error.to_string() })
    }
}

#[cfg(test)]
mod tests {
    use iroh::SecretKey;
    use proptest::prelude::*;

    use super::*;

    fn ticket() -> Ticket {
        let at = EndpointAddr::new(SecretKey::from_bytes(&[1; 32]).public())
            .with_ip_addr("192.0.2.1:4000".parse().unwrap())
            .with_ip_addr("[2001:db8::1]:4000".parse().unwrap());
        Ticket::new(SecretKey::from_bytes(&[2; 32]).public(), at, "mesh-llm-0123456789".into(), [3; 16], 1_800_000_000)
    }

    #[test]
    fn a_ticket_is_one_word_and_reads_back() {
        let text = ticket().to_string();
        assert!(text.starts_with("mesh-") && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-'), "{text}");
        assert_eq!(text.parse(), Ok(ticket()));
        assert_eq!(format!(" {text}\n").parse(), Ok(ticket()));
        assert!(!format!("{:?}", ticket()).contains("secret"), "a log must not let others in");
    }

    #[test]
    fn others_are_refused_in_words() {
        let text = ticket().to_string();
        for bad in
            ["", "mesh-", "hello", &text[..text.len() - 3], &text.replace("mesh-", "blob"), &"mesh-a".repeat(9999)]
        {
            let error = bad.parse::<Ticket>().unwrap_err().to_string();
            assert!(error.contains("mesh invite"), "{error}");
        }
        let newer = Ticket { version: 2, ..ticket() }.to_string();
        assert!(newer.parse::<Ticket>().unwrap_err().to_string().contains("newer"));
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "mesh-[a-z2-7]{0,300}") {
            text.parse::<Ticket>().ok();
        }
    }
}
