#![no_main]
//! Who belongs to a mesh, what its members tell of themselves, and how others ask to be let in.

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use mesh_backend_mesh::{
    SecretKey, Ticket,
    adverts::{ADDRESSES_MAX, GOSSIP_BYTES_MAX, Gossiped, Shown, Spoken},
    trust::{Certificate, Judge, Revocations, SIGNED_BYTES_MAX, Signed},
    wire::{CARD_BYTES_MAX, Card, Join, Joined, Proof, STRANGER_BYTES_MAX},
};
use mesh_fuzz::message;
use mesh_peers::advert::OFFERS_MAX;

/// The keys that the seeds are signed with.
static NODE: LazyLock<SecretKey> = LazyLock::new(|| SecretKey::from_bytes(&[1; 32]));
static MESH: LazyLock<SecretKey> = LazyLock::new(|| SecretKey::from_bytes(&[2; 32]));

/// What counts is within its bounds, and from whom it says.
fn heard(shown: &Shown) {
    if let Ok(spoken) = shown.open(&Judge::new(MESH.public())) {
        assert_eq!(spoken.advert.node.0, *shown.node.as_bytes());
        assert!(spoken.at.addrs.len() <= ADDRESSES_MAX && spoken.advert.offers.len() <= OFFERS_MAX);
    }
}

fn revoked(list: Signed<Revocations>) {
    let mut judge = Judge::new(MESH.public());
    if judge.revoke(list).is_ok() {
        assert_eq!(judge.revoked().map(|said| said.mesh), Some(MESH.public()));
    }
}

fuzz_target!(|content: &[u8]| {
    match message::<Gossiped>(content, GOSSIP_BYTES_MAX) {
        Some(Gossiped::Advert(shown)) => heard(&shown),
        Some(Gossiped::Revocations(list)) => revoked(list),
        Some(Gossiped::Loss(_)) | None => {}
    }
    if let Some(card) = message::<Card>(content, CARD_BYTES_MAX) {
        card.adverts.iter().for_each(heard);
        Judge::new(MESH.public()).admit(NODE.public(), &card.certificate).ok();
        card.revocations.into_iter().for_each(revoked);
    }
    message::<Proof>(content, STRANGER_BYTES_MAX);
    message::<Join>(content, STRANGER_BYTES_MAX);
    message::<Joined>(content, STRANGER_BYTES_MAX);

    // What is signed is read after its signature, which nobody guesses: signed here, it is read whatever it is.
    if let Some(certificate) = message::<Certificate>(content, SIGNED_BYTES_MAX) {
        let belongs = certificate.mesh == MESH.public() && certificate.node == NODE.public();
        let admitted = Judge::new(MESH.public()).admit(NODE.public(), &Signed::new(&MESH, &certificate));
        assert_eq!(admitted.is_ok(), belongs);
    }
    if let Some(list) = message::<Revocations>(content, SIGNED_BYTES_MAX) {
        revoked(Signed::new(&MESH, &list));
    }
    if let Some(spoken) = message::<Spoken>(content, SIGNED_BYTES_MAX) {
        let certificate = Certificate { mesh: MESH.public(), node: NODE.public(), issued_s: 1 };
        let certificate = Signed::new(&MESH, &certificate);
        heard(&Shown { node: NODE.public(), certificate, spoken: Signed::new(&NODE, &spoken), age_ms: 0 });
    }

    // A ticket as its bytes, and as the text that is handed over.
    if let Some(ticket) = message::<Ticket>(content, STRANGER_BYTES_MAX) {
        if let Ok(read) = ticket.to_string().parse::<Ticket>() {
            assert_eq!(read, ticket);
        }
    }
    if let Some(ticket) = std::str::from_utf8(content).ok().and_then(|text| text.parse::<Ticket>().ok()) {
        assert_eq!(ticket.to_string().parse(), Ok(ticket));
    }
});
