//! The plan of a transaction: which file goes where, as chains of names.
//!
//! Invariant: all names mean the files that exist before the transaction, and each file goes to at most one name; a
//! transaction that would mean something else if its changes were made one after the other is refused.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::Error;
use crate::chain::{Chain, Spot};
use crate::error::io_error;
use crate::platform::Identity;
use crate::staging::Workspace;

/// For each name, where its file goes and what comes there.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    nodes: Vec<Node>,
    /// The index of the node of each name in a directory.
    positions: HashMap<((u64, u64), OsString), usize>,
}

#[derive(Debug)]
struct Node {
    path: Arc<Path>,
    spot: Spot,
    /// The file that is there now.
    old: Option<Identity>,
    leaves: Leaves,
    arrives: Option<Arrives>,
}

/// Where the file of a name goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leaves {
    /// It is replaced, if it exists.
    Replaced,
    Removed,
    /// To the name of that node.
    To(usize),
}

/// What comes to a name.
#[derive(Clone, Debug)]
enum Arrives {
    /// The file that is staged under this name.
    New(OsString, Identity),
    Moved,
}

impl Plan {
    /// Plans that the file staged as `temp` becomes the file at `spot`, which may have to be free.
    pub(crate) fn put(
        &mut self,
        path: &Arc<Path>,
        spot: Spot,
        temp: OsString,
        new: Identity,
        must_be_new: bool,
    ) -> Result<(), Error> {
        let node = self.node(path, spot)?;
        if must_be_new && self.nodes[node].old.is_some() {
            return Err(Error::AlreadyExists { path: path.to_path_buf() });
        }
        self.arrive(node, Arrives::New(temp, new))
    }

    pub(crate) fn remove(&mut self, path: &Arc<Path>, spot: Spot) -> Result<(), Error> {
        let node = self.node(path, spot)?;
        self.leave(node, Leaves::Removed)
    }

    pub(crate) fn rename(&mut self, from: (&Arc<Path>, Spot), to: (&Arc<Path>, Spot)) -> Result<(), Error> {
        let (from, to) = (self.node(from.0, from.1)?, self.node(to.0, to.1)?);
        self.leave(from, Leaves::To(to))?;
        self.arrive(to, Arrives::Moved)
    }

    fn node(&mut self, path: &Arc<Path>, spot: Spot) -> Result<usize, Error> {
        let key = (spot.site.id, spot.name.clone());
        if let Some(&known) = self.positions.get(&key) {
            return Ok(known);
        }
        let old = spot.dir().identify(&spot.name).map_err(io_error("look at", path))?;
        self.positions.insert(key, self.nodes.len());
        self.nodes.push(Node { path: path.clone(), spot, old, leaves: Leaves::Replaced, arrives: None });
        Ok(self.nodes.len() - 1)
    }

    fn leave(&mut self, node: usize, leaves: Leaves) -> Result<(), Error> {
        let closes = matches!(leaves, Leaves::To(to) if self.leads(to, node));
        let node = &mut self.nodes[node];
        // If a file arrives at a name and the name's file then leaves, the caller would expect the new file to leave. A
        // closed circle is unambiguous.
        if node.leaves != Leaves::Replaced || (node.arrives.is_some() && !closes) {
            return Err(Error::RepeatedTarget { path: node.path.to_path_buf() });
        }
        if node.old.is_none() {
            return Err(io_error("find the file", &node.path)(io::ErrorKind::NotFound.into()));
        }
        node.leaves = leaves;
        Ok(())
    }

    fn arrive(&mut self, node: usize, arrives: Arrives) -> Result<(), Error> {
        let node = &mut self.nodes[node];
        if node.leaves == Leaves::Removed || node.arrives.is_some() {
            return Err(Error::RepeatedTarget { path: node.path.to_path_buf() });
        }
        node.arrives = Some(arrives);
        Ok(())
    }

    /// Whether following the moves from the name `from` leads to the name `to`.
    fn leads(&self, from: usize, to: usize) -> bool {
        let mut node = from;
        while let Leaves::To(next) = self.nodes[node].leaves {
            if next == to {
                return true;
            }
            if next == from {
                // Another circle, which is already closed.
                return false;
            }
            node = next;
        }
        false
    }

    /// Moves each existing file to the upper layer if its directory is on an overlay.
    ///
    /// The first change of a file in a lower layer, even a rename, copies it. The copy is born later, and may have
    /// another inode number. So this happens before the file's identity is recorded.
    pub(crate) fn lift(&mut self, workspace: &Workspace) -> Result<(), Error> {
        for node in self.nodes.iter_mut().filter(|node| node.old.is_some() && node.spot.site.is_layered) {
            node.old = node.spot.lift(&workspace.name()).map_err(io_error("look at", &node.path))?;
        }
        Ok(())
    }

    /// Builds chains of the names between which files move. Chains that put a file somewhere come first.
    pub(crate) fn chains(&self, workspace: &Workspace) -> Vec<Chain> {
        let mut is_told = vec![false; self.nodes.len()];
        let mut chains = Vec::new();
        let starts = |node: &Node| !matches!(node.arrives, Some(Arrives::Moved));
        for first in (0..self.nodes.len()).filter(|&node| starts(&self.nodes[node])) {
            let nodes = self.follow(first, &mut is_told);
            chains.push(self.chain(workspace, &nodes));
        }
        // The remaining nodes form circles.
        for first in 0..self.nodes.len() {
            if !is_told[first] {
                let nodes = self.follow(first, &mut is_told);
                chains.push(self.circle(workspace, &nodes));
            }
        }
        chains.sort_by_key(|chain| chain.is_hidden() && chain.files[0].is_none());
        chains
    }

    fn follow(&self, first: usize, is_told: &mut [bool]) -> Vec<usize> {
        let mut nodes = Vec::new();
        let mut next = Some(first);
        while let Some(node) = next.filter(|&node| !is_told[node]) {
            is_told[node] = true;
            nodes.push(node);
            next = match self.nodes[node].leaves {
                Leaves::To(to) => Some(to),
                Leaves::Replaced | Leaves::Removed => None,
            };
        }
        nodes
    }

    fn chain(&self, workspace: &Workspace, nodes: &[usize]) -> Chain {
        let first = &self.nodes[nodes[0]];
        let (hidden, new) = match &first.arrives {
            Some(Arrives::New(temp, identity)) => (temp.clone(), Some(*identity)),
            _ => (workspace.name(), None),
        };
        if let (None, [from, to]) = (new, nodes)
            && self.nodes[*to].old.is_none()
        {
            // A move to a free name is a single rename, like the system's own.
            let carrier = self.nodes[*from].spot.clone();
            return Chain { carrier, hidden, names: self.spots(&[*to]), files: self.files(None, nodes) };
        }
        let carrier = Spot { site: first.spot.site.clone(), name: hidden.clone() };
        Chain { carrier, hidden, names: self.spots(nodes), files: self.files(Some(new), nodes) }
    }

    /// A circle's files change places through exchanges with the first name.
    fn circle(&self, workspace: &Workspace, nodes: &[usize]) -> Chain {
        let carrier = self.nodes[nodes[0]].spot.clone();
        let hidden = workspace.name();
        Chain { carrier, hidden, names: self.spots(&nodes[1..]), files: self.files(None, nodes) }
    }

    fn spots(&self, nodes: &[usize]) -> Vec<Spot> {
        nodes.iter().map(|&node| self.nodes[node].spot.clone()).collect()
    }

    fn files(&self, first: Option<Option<Identity>>, nodes: &[usize]) -> Vec<Option<Identity>> {
        first.into_iter().chain(nodes.iter().map(|&node| self.nodes[node].old)).collect()
    }
}
