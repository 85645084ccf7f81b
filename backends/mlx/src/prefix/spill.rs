//! A store with files: what leaves memory is written, what is asked for is loaded.
//!
//! Off unless asked for. A file that is not what it should be costs what it held and all that continues it, never an
//! error: the prompt is computed as if it had not been known.

use std::{io, sync::Arc};

use super::{
    DiskSettings, Limits, PrefixStore,
    disk::{self, Disk, WriteError},
    file::{Content, FileError},
    payload::{NamedTensor, Payload, Segment},
    restore::restore,
    tree::{FileRef, NodeId, Path, ROOT, Rest, Slice},
};

/// A file that is being loaded from, down a path.
struct Loading<S> {
    file: Arc<FileRef>,
    /// How much of its run was passed.
    at: usize,
    rest: Rest<S>,
    point: Option<Vec<NamedTensor>>,
}

impl<S: Segment, P: Payload> PrefixStore<S, P> {
    /// A store that keeps files too, and knows what earlier ones left there.
    pub fn with_disk(needs_points: bool, limits: Limits, settings: DiskSettings) -> io::Result<Self> {
        let mut store = Self::new(needs_points, limits);
        let mut disk = Disk::open(settings)?;
        // Cold nodes take room as well: at most half of it at first, and what they are made of no more.
        let tokens_max = usize::try_from(limits.bytes_max / 16).unwrap_or(usize::MAX);
        let found = disk.scan(limits.nodes_max / 4, tokens_max);
        let wrong =
            restore(&mut store.tree, disk.chain(), found).map_err(|error| io::Error::other(error.to_string()))?;
        for name in wrong {
            disk.give_up(&name, &FileError::Unfit("its name is not that of its tokens"));
        }
        store.disk = Some(disk);
        store.thin(limits.nodes_max / 2, limits.bytes_max / 2);
        Ok(store)
    }

    /// Writes one more part of what is only in memory, what was used last first. Answers whether there may be another:
    /// to be called while nothing else is to do, and before the end until it says no.
    pub fn flush_some(&mut self) -> bool {
        if self.disk.is_none() {
            return false;
        }
        let Some(id) = self.tree.unwritten(self.disk_full_at) else { return false };
        self.save(id);
        // Where writing fails, the next would, for now.
        self.tree.get(id).is_some_and(|node| node.is_written() || node.unwritable)
    }

    /// Brings one more part of what only files have to memory, what was used last first, as long as the store does not
    /// occupy more than `bytes_max`. This is no use of it. Answers what it brought; nothing if there is no more, or a file
    /// was of no use, which `more` tells apart.
    pub fn thaw_some(&mut self, bytes_max: u64, more: &mut bool) -> Option<(&S, Option<&P>)> {
        let bytes_max = bytes_max.min(self.tree.limits.bytes_max);
        let next = self.tree.thawing().and_then(|id| Some((id, self.tree.node(id).file.clone()?)));
        *more = next.as_ref().is_some_and(|(_, slice)| self.tree.bytes().saturating_add(slice.file.bytes) <= bytes_max);
        let (id, slice) = next.filter(|_| *more)?;
        let wants_point = self.tree.needs_points && self.tree.node(id).point_on_disk;
        if let Err(error) = self.load_node(id, &slice, wants_point, &mut None) {
            if let Some(disk) = &mut self.disk {
                disk.give_up(&slice.file.name, &error);
            }
            self.tree.forget_files(std::slice::from_ref(&slice.file.name));
            return None;
        }
        let node = self.tree.node(id);
        node.segment.as_ref().map(|segment| (segment, node.point.as_ref()))
    }

    /// Counts uses in microseconds where files' times have to agree with them.
    pub(super) fn keep_time(&mut self) {
        if self.disk.is_some() {
            self.tree.advance(disk::now());
        }
    }

    /// Says that a path is used now, in memory and on disk.
    pub(super) fn touch(&mut self, path: &Path) {
        self.keep_time();
        self.tree.touch(path);
        if let Some(&(end, _)) = path.last() {
            self.stamp_to(end);
        }
    }

    /// Gives the files of a path the times of their nodes.
    fn stamp_to(&self, end: NodeId) {
        let Some(disk) = &self.disk else { return };
        let mut at = end;
        while at != ROOT {
            let node = self.tree.node(at);
            let above = self.tree.node(node.parent);
            // The first part of a file was used last.
            let part =
                node.file.as_ref().filter(|slice| above.file.as_ref().is_none_or(|part| part.file != slice.file));
            if let Some(slice) = part {
                disk.stamp(&slice.file, node.used);
            }
            at = node.parent;
        }
    }

    /// Brings a path's segments and the point at its end to memory. If that fails, the tree knows less than before.
    pub(super) fn load(&mut self, path: &Path) -> bool {
        let mut loading = None;
        for (index, &(id, _)) in path.iter().enumerate() {
            let node = self.tree.node(id);
            let is_last = index + 1 == path.len();
            let wants_point = is_last && self.tree.needs_points && node.point.is_none();
            if node.segment.is_some() && !wants_point {
                continue;
            }
            let Some(slice) = node.file.clone() else {
                // Nothing has what the node promises, which does not happen while the invariants hold.
                self.tree.remove(id);
                return false;
            };
            if let Err(error) = self.load_node(id, &slice, wants_point, &mut loading) {
                if let Some(disk) = &mut self.disk {
                    disk.give_up(&slice.file.name, &error);
                }
                self.tree.forget_files(std::slice::from_ref(&slice.file.name));
                return false;
            }
        }
        true
    }

    fn load_node(
        &mut self,
        id: NodeId,
        slice: &Slice,
        wants_point: bool,
        loading: &mut Option<Loading<S>>,
    ) -> Result<(), FileError> {
        let unfit = |_| FileError::Unfit("its tensors are not what they should be");
        let mut opened = match loading.take() {
            Some(opened) if opened.file == slice.file && opened.at <= slice.skip => opened,
            _ => self.open(&slice.file)?,
        };
        let tokens = self.tree.node(id).run.len();
        opened.rest.take(slice.skip - opened.at).map_err(unfit)?;
        let segment = opened.rest.take(tokens).map_err(unfit)?.filter(|segment| segment.tokens() == tokens);
        let segment = segment.ok_or(FileError::Unfit("its run is too short"))?;
        opened.at = slice.skip + tokens;
        let mut point = None;
        if wants_point {
            let tensors = opened.point.take().ok_or(FileError::Unfit("its point is missing"))?;
            let before = slice.file.start + slice.file.tokens;
            point = Some(P::from_tensors(before, tensors).map_err(|_| FileError::Unfit("its point cannot be read"))?);
        }
        self.tree.change(id, |node| {
            node.segment.get_or_insert(segment);
            node.point = node.point.take().or(point);
        });
        *loading = Some(opened);
        Ok(())
    }

    fn open(&self, file: &Arc<FileRef>) -> Result<Loading<S>, FileError> {
        let disk = self.disk.as_ref().ok_or(FileError::Unfit("there is no disk"))?;
        let Content { segment, point } = disk.read(file)?;
        let segment = S::from_tensors(file.tokens, segment).ok().filter(|segment| segment.tokens() == file.tokens);
        let segment = segment.ok_or(FileError::Unfit("its segment cannot be read"))?;
        Ok(Loading { file: file.clone(), at: 0, rest: Rest(Some(segment)), point })
    }

    /// Has a file hold what a warm node holds; answers whether one holds its segment at least.
    pub(super) fn save(&mut self, id: NodeId) -> bool {
        let Some(disk) = &self.disk else { return false };
        let node = self.tree.node(id);
        let is_there = node.file.as_ref().is_some_and(|slice| disk.has(&slice.file));
        if (is_there && node.is_written()) || node.unwritable {
            return is_there;
        }
        // What it continues is not to give way to it.
        self.stamp_to(node.parent);
        // Asked before tensors are read from the device.
        match disk.room(node.weight(), node.used).and_then(|()| self.write(id)) {
            Ok(()) => return true,
            Err(WriteError::Unwritable) => self.tree.node_mut(id).unwritable = true,
            Err(WriteError::NoRoom) => self.disk_full_at = self.disk_full_at.max(self.tree.node(id).used),
            Err(WriteError::Io(_) | WriteError::GivenUp) => {}
        }
        is_there
    }

    fn write(&mut self, id: NodeId) -> Result<(), WriteError> {
        let Some(disk) = &mut self.disk else { return Err(WriteError::GivenUp) };
        let node = self.tree.node(id);
        let segment = node.segment.as_ref().map(S::tensors).transpose();
        let point = node.point.as_ref().map(P::tensors).transpose();
        let (Ok(Some(segment)), Ok(point)) = (segment, point) else { return Err(WriteError::Unwritable) };
        let mut chain = disk.chain();
        let before = self.tree.tokens_to(node.parent);
        chain.extend(&before);
        let used = node.used;
        let (file, gone) = disk.write(&chain, before.len(), &node.run, segment, point, used)?;
        let pointed = file.pointed;
        let node = self.tree.node_mut(id);
        (node.file, node.point_on_disk) = (Some(Slice { file: Arc::new(file), skip: 0 }), pointed);
        self.tree.forget_files(&gone);
        Ok(())
    }
}
