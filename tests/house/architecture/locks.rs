//! The rules for locks.

use std::collections::BTreeSet;

use super::{Source, assert_none, names, sources};

/// Where a lock is held over calls on local files, and why; callers block there.
const LOCKED_FILES: [&str; 11] = [
    // Of two versions of a record the later one stays.
    "soci-fs/src/node/remote/slots.rs",
    // The same of the table of mappings.
    "soci-fs/src/node/remote/id_maps.rs",
    // What shows a snapshot with other owners is put up or taken down once.
    "soci-fs/src/node/snapshots/mapped.rs",
    // The same of what shows a layer; and one mount after the other, so that each is known by what it adds.
    "soci-fs/src/node/remote/trees.rs",
    "soci-fs/src/fuse/mount/erofs.rs",
    // No layer is opened while it is being removed.
    "soci-fs/src/layer/store.rs",
    "soci-fs/src/layer/store/evict.rs",
    // No span is written where a hole is being punched.
    "soci-fs/src/layer/store/layer.rs",
    // A page is written by one of those that bring it.
    "soci-fs/src/layer/store/layer/parts.rs",
    // The file is in memory, and has one writer.
    "soci-fs/src/node/keychain/pulls.rs",
    // Lines of two threads do not mix: the lock is standard output's own.
    "soci-cli/src/report/output.rs",
];

/// What a call on a file looks like.
const ON_FILES: [&str; 16] = [
    "fs::",
    "File::",
    "sync_all(",
    "sync_data(",
    "set_len(",
    "write_all(",
    "write_through(",
    "write_all_at(",
    "fallocate(",
    // Those of the table of slots, of the layer store, and of what provides layers to snapshots.
    "slots.assign(",
    "slots.join(",
    "slots.release(",
    "slots.erase(",
    "set_aside(",
    "provider.release(",
    "provider.keep_id_maps(",
];

/// A line of code, how far it is indented, and its number.
struct Line<'s> {
    number: usize,
    indent: usize,
    text: &'s str,
}

impl Source {
    fn code(&self) -> Vec<Line<'_>> {
        let lines = self.lines().filter(|(_, line)| !line.trim().is_empty());
        let line = |(number, line): (usize, _)| {
            let text = str::trim_start(line);
            Line { number, indent: line.len() - text.len(), text }
        };
        lines.map(line).collect()
    }

    /// The functions of this file that make calls on files, by themselves or through others of this file.
    fn functions_on_files(&self, code: &[Line<'_>]) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        loop {
            let before = found.len();
            for (at, line) in code.iter().enumerate() {
                let Some(name) = function(line.text) else { continue };
                let body = code[at + 1..].iter().take_while(|inner| inner.indent > line.indent);
                if body.into_iter().any(|inner| is_on_files(inner.text, &found)) {
                    found.insert(name.to_owned());
                }
            }
            if found.len() == before {
                return found;
            }
        }
    }
}

/// The name of the function that a line begins.
fn function(line: &str) -> Option<&str> {
    let (before, rest) = line.split_once("fn ")?;
    let is_start =
        before.split_whitespace().all(|word| word.starts_with("pub") || word == "const" || word.ends_with(')'));
    let end = rest.find(['(', '<'])?;
    is_start.then_some(&rest[..end])
}

fn is_on_files(line: &str, functions: &BTreeSet<String>) -> bool {
    ON_FILES.iter().any(|call| names(line, call, "")) || functions.iter().any(|name| names(line, name, "("))
}

/// The variable that a line gives a lock to. Values that are taken out from under a lock within a line are none.
fn guard(line: &str) -> Option<&str> {
    let rest = line.strip_prefix("let ")?;
    let (name, value) = rest.strip_prefix("mut ").unwrap_or(rest).split_once(" = ")?;
    [".lock();", ".read();", ".write();"].iter().any(|call| value.ends_with(call)).then_some(name)
}

/// The places in a file where a lock is held over a call on files.
fn locked_calls(source: &Source) -> Vec<String> {
    let code = source.code();
    let on_files = source.functions_on_files(&code);
    let mut found = Vec::new();
    for (at, line) in code.iter().enumerate() {
        let Some(name) = guard(line.text) else { continue };
        let dropped = format!("drop({name})");
        let held =
            code[at + 1..].iter().take_while(|inner| inner.indent >= line.indent && !inner.text.contains(&dropped));
        let calls = held.filter(|inner| is_on_files(inner.text, &on_files));
        found.extend(calls.map(|call| format!("{}:{}: {}", source.path, call.number, call.text)));
    }
    found
}

/// Architecture invariant: no lock is held over calls on files but where that is decided. (Over an `await` the
/// compiler's lints find them.)
#[test]
fn locks_are_not_held_over_files() {
    let sources = sources("/src/");
    let product = sources.iter().filter(|source| source.path.starts_with("soci-") && !source.is_test());
    let (listed, others): (Vec<_>, Vec<_>) = product.partition(|source| source.is_under(&LOCKED_FILES));
    let found: Vec<String> = others.iter().flat_map(|source| locked_calls(source)).collect();
    assert_none("locks held over calls on files", &found);
    let idle = listed.iter().filter(|source| locked_calls(source).is_empty());
    assert_none("listed without need", &idle.map(|source| source.path.clone()).collect::<Vec<_>>());
}

/// Architecture invariant: one kind of lock, which a panic does not poison: what a lock guards is never left half
/// changed.
#[test]
fn locks_are_parking_lots() {
    let mut found = Vec::new();
    for source in sources("/src/").iter().filter(|source| source.path.starts_with("soci-")) {
        let lines = source.lines().filter(|(_, line)| {
            let is_std = line.contains("std::sync::") && !line.contains("tokio::sync::");
            is_std && ["Mutex", "RwLock", "Condvar", "PoisonError"].iter().any(|name| line.contains(name))
        });
        found.extend(lines.map(|(number, line)| format!("{}:{number}: {line}", source.path)));
    }
    assert_none("locks of the standard library", &found);
}

/// What that finds: calls of this file's functions, too, up to the end of the block or of the lock.
#[test]
fn locks_over_files_are_found() {
    let text = "\
impl Table {
    fn bad(&self) {
        let _held = self.table.lock();
        self.indirect();
    }
    fn worse(&self) {
        let mut table = self.table.lock();
        std::fs::remove_file(path);
    }
    fn good(&self) {
        let table = self.table.lock();
        drop(table);
        self.indirect();
        let number = self.table.lock().free();
        self.write(number);
        {
            let table = self.table.lock();
        }
        self.write(number);
    }
    fn indirect(&self) {
        self.write(1);
    }
    fn write(&self, number: u8) {
        file.sync_all();
    }
}
";
    let found = locked_calls(&Source { path: "table.rs".to_owned(), text: text.to_owned() });
    assert_eq!(found, ["table.rs:4: self.indirect();", "table.rs:8: std::fs::remove_file(path);"]);
}
