//! The tree that files found at start make: cold nodes only.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use super::{
    disk::Found,
    file::{Chain, Hash},
    payload::{Payload, Segment},
    tree::{FileRef, NodeId, ROOT, Slice, Tree},
};

/// Adds the files that can be reached from the start of a sequence, sorted by where they begin. Answers the names of
/// those that are not what their names say. The others are left alone: what they continue may come back.
pub(super) fn restore<S: Segment, P: Payload>(
    tree: &mut Tree<S, P>,
    before: Chain,
    found: Vec<Found>,
) -> Result<Vec<String>, S::Error> {
    let starts: BTreeSet<usize> = found.iter().map(|found| found.file.start).collect();
    let parents: HashSet<Hash> = found.iter().map(|found| found.head.parent).collect();
    let mut ends: HashMap<Hash, (Chain, NodeId, usize)> = HashMap::from([(before.hash(), (before, ROOT, 0))]);
    let mut wrong = Vec::new();
    for Found { file, head, hash, used } in found {
        let Some((mut chain, parent, depth)) = ends.get(&head.parent).cloned() else { continue };
        if depth != file.start {
            wrong.push(file.name);
            continue;
        }
        // Where other files may go on: within the run too, if it was cut after it was written.
        let (mut done, mut places) = (0, Vec::new());
        for start in starts.range(file.start + 1..file.start + file.tokens) {
            let at = start - file.start;
            chain.extend(&head.tokens[done..at]);
            done = at;
            if parents.contains(&chain.hash()) {
                places.push((at, chain.clone()));
            }
        }
        chain.extend(&head.tokens[done..]);
        if chain.hash() != hash {
            wrong.push(file.name);
            continue;
        }
        places.push((head.tokens.len(), chain));
        tree.attach(parent, &head.tokens, Arc::new(file), used)?;
        for (at, chain) in places {
            let mut path = tree.walk(parent, &head.tokens[..at]);
            tree.cut(&mut path)?;
            if let Some(&(end, _)) = path.last() {
                ends.insert(chain.hash(), (chain, end, depth + at));
            }
        }
    }
    Ok(wrong)
}

impl<S: Segment, P: Payload> Tree<S, P> {
    /// Adds what a file has of tokens after `parent`.
    fn attach(&mut self, parent: NodeId, tokens: &[u32], file: Arc<FileRef>, used: u64) -> Result<(), S::Error> {
        let mut path = self.walk(parent, tokens);
        self.cut(&mut path)?;
        let known: usize = path.iter().map(|(_, used)| used).sum();
        let mut end = path.last().map_or(parent, |(id, _)| *id);
        let pointed = file.pointed;
        if known < tokens.len() {
            end = self.add(end, &tokens[known..], used);
            self.node_mut(end).file = Some(Slice { file, skip: known });
        } else if pointed {
            let skip = known - self.node(end).run.len();
            self.node_mut(end).file = Some(Slice { file, skip });
        }
        let node = self.node_mut(end);
        node.point_on_disk |= pointed;
        node.point_used = node.point_used.max(used);
        self.advance(used);
        let mut at = end;
        while at != ROOT {
            let node = self.node_mut(at);
            node.used = node.used.max(used);
            at = node.parent;
        }
        Ok(())
    }
}
