//! Applies the entries of a layer in their order, as the extraction of the archive would.
//!
//! Where extractors differ we do as the container engines do: names are cleaned lexically and cannot leave the root;
//! symbolic links among the parents are followed inside the root; a later entry replaces an earlier one, except that a
//! directory over a directory only changes its metadata; a hard link needs a target that is already there, and its
//! header's mode, owner and time become the file's. Where they would refuse the whole layer, the entry alone is left
//! out, as GNU tar does. One thing follows tar and not the engines: an entry for the root itself sets the root's
//! metadata.
//!
//! Layers made on AUFS keep files with several names in `.wh..wh.plnk`, and the names that are shown are hard links
//! into it. What lies inside of a mark is not shown, but kept as a target for such links.

use soci_index::format::entry::{Entry, EntryKind};

use crate::tree::draft::Draft;
use crate::tree::name::{Mark, components, is_mark, is_valid, mark, split_simple};
use crate::tree::{NodeKind, NodeNumber, SkipReason, Tree, TreeError, counted};

/// Longest target that the kernel accepts for a symbolic link.
const TARGET_BYTES_MAX: usize = 4095;

pub(super) fn of_layer(entries: &[Entry]) -> Result<Tree, TreeError> {
    counted(entries.len(), "entries")?;
    let mut draft = Draft::new(entries.len());
    for (number, entry) in (0_u32..).zip(entries) {
        if let Err(reason) = apply(&mut draft, number, entry) {
            draft.skip(number, reason);
        }
    }
    draft.finish()
}

fn apply<'a>(draft: &mut Draft<'a>, number: u32, entry: &'a Entry) -> Result<(), SkipReason> {
    let placed = place(draft, &entry.name).inspect_err(|reason| {
        if *reason == SkipReason::Mark {
            hide(draft, number, entry);
        }
    });
    let Some((directory, name)) = placed? else {
        if entry.kind != EntryKind::Directory {
            return Err(SkipReason::Root);
        }
        draft.describe(NodeNumber::ROOT.0, number);
        return Ok(());
    };
    match mark(name) {
        Mark::None => {}
        Mark::Whiteout(hidden) => {
            draft.white_out(directory, hidden);
            return Ok(());
        }
        Mark::Opaque => {
            draft.set_opaque(directory);
            return Ok(());
        }
        Mark::Void => {
            hide(draft, number, entry);
            return Err(SkipReason::Mark);
        }
    }
    match entry.kind {
        EntryKind::Hardlink => return hard_link(draft, number, entry, directory, name),
        EntryKind::Directory => put_directory(draft, number, directory, name),
        EntryKind::Symlink => {
            check_target(&entry.link)?;
            let node = draft.put(directory, name, NodeKind::Symlink, Some(number));
            draft.set_target(node, &entry.link);
        }
        EntryKind::Regular => {
            draft.put(directory, name, NodeKind::Regular, Some(number));
        }
        EntryKind::CharDevice => {
            draft.put(directory, name, NodeKind::CharDevice, Some(number));
        }
        EntryKind::BlockDevice => {
            draft.put(directory, name, NodeKind::BlockDevice, Some(number));
        }
        EntryKind::Fifo => {
            draft.put(directory, name, NodeKind::Fifo, Some(number));
        }
    }
    Ok(())
}

/// The directory node and last component of an entry's path; `None` for the root itself.
fn place<'a>(draft: &mut Draft<'a>, path: &'a [u8]) -> Result<Option<(u32, &'a [u8])>, SkipReason> {
    let simple = split_simple(path);
    if let Some((spelled, name)) = simple
        && let Some(directory) = draft.remembered_directory(spelled)
    {
        return if is_valid(name) { Ok(Some((directory, name))) } else { Err(SkipReason::Name) };
    }
    let clean = components(path);
    let Some((name, parents)) = clean.split_last() else {
        return Ok(None);
    };
    if !clean.iter().all(|component| is_valid(component)) {
        return Err(SkipReason::Name);
    }
    if parents.iter().any(|component| is_mark(component)) {
        return Err(SkipReason::Mark);
    }
    if mark(name) == Mark::Void {
        // Nothing of it shows, so its parents need not exist either.
        return Err(SkipReason::Mark);
    }
    let Some(directory) = draft.directory(parents, true)? else {
        return Err(SkipReason::ParentNotDirectory);
    };
    if let Some((spelled, _)) = simple {
        draft.remember_directory(spelled, directory);
    }
    Ok(Some((directory, name)))
}

/// Keeps a file inside of a mark for hard links to it.
fn hide<'a>(draft: &mut Draft<'a>, number: u32, entry: &'a Entry) {
    let path = components(&entry.name).join(&b'/');
    match entry.kind {
        EntryKind::Regular => draft.hide(path, number),
        EntryKind::Hardlink => {
            let found = target(draft, &components(&entry.link)).ok().flatten();
            if let Some(node) = found.filter(|node| draft.kind(*node) == NodeKind::Regular) {
                draft.hide_link(path, node);
            }
        }
        EntryKind::Directory
        | EntryKind::Symlink
        | EntryKind::CharDevice
        | EntryKind::BlockDevice
        | EntryKind::Fifo => {}
    }
}

fn put_directory<'a>(draft: &mut Draft<'a>, number: u32, directory: u32, name: &'a [u8]) {
    match draft.child(directory, name) {
        Some(node) if draft.kind(node) == NodeKind::Directory => draft.describe(node, number),
        _ => {
            draft.put(directory, name, NodeKind::Directory, Some(number));
        }
    }
}

fn hard_link<'a>(
    draft: &mut Draft<'a>,
    number: u32,
    entry: &'a Entry,
    directory: u32,
    name: &'a [u8],
) -> Result<(), SkipReason> {
    let clean = components(&entry.link);
    if clean.is_empty() {
        return Err(SkipReason::LinkToDirectory);
    }
    let found = target(draft, &clean)?;
    match found.map(|node| (node, draft.kind(node))) {
        Some((_, NodeKind::Directory)) => Err(SkipReason::LinkToDirectory),
        None | Some((_, NodeKind::ForeignLink | NodeKind::Whiteout)) => {
            // A lower layer may have the target. What is already here stays: a link that fails replaces nothing.
            if draft.child(directory, name).is_none() {
                let node = draft.put(directory, name, NodeKind::ForeignLink, Some(number));
                draft.set_target(node, &entry.link);
            }
            Ok(())
        }
        Some((
            node,
            NodeKind::Regular | NodeKind::Symlink | NodeKind::CharDevice | NodeKind::BlockDevice | NodeKind::Fifo,
        )) => {
            draft.link(directory, name, node);
            draft.describe_link(node, number);
            Ok(())
        }
    }
}

/// The node that a hard link leads to by a clean path, be it shown or not.
fn target<'a>(draft: &mut Draft<'a>, clean: &[&'a [u8]]) -> Result<Option<u32>, SkipReason> {
    if let Some(hidden) = draft.hidden(&clean.join(&b'/')) {
        return Ok(Some(hidden));
    }
    let Some((name, parents)) = clean.split_last() else { return Ok(None) };
    Ok(draft.directory(parents, false)?.and_then(|parent| draft.child(parent, name)))
}

fn check_target(target: &[u8]) -> Result<(), SkipReason> {
    if target.is_empty() || target.len() > TARGET_BYTES_MAX || target.contains(&0) {
        return Err(SkipReason::LinkTarget);
    }
    Ok(())
}
