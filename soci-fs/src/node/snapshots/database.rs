//! The database of snapshots: the only file that knows redb.
//!
//! Four tables: records by name, and three that are derived from them or count: which snapshots have which parent,
//! which stand on which layer, and numbers. All changes of one call are one transaction that is on disk when the call
//! returns: containerd persists what was acknowledged, so we must too. Records are JSON, readable for humans and later
//! versions.
//!
//! redb refuses all work after a failed write (a full disk, say) until it is opened again; that is done here, so that a
//! daemon recovers when there is room again.

use std::path::{Path, PathBuf};

use parking_lot::RwLock;
use redb::{Durability, ReadableDatabase, ReadableTable, Table, TableDefinition, WriteTransaction};

use crate::node::snapshots::SnapshotError;
use crate::node::snapshots::record::Record;

type Records<'t> = Table<'t, &'static str, &'static [u8]>;
type Pairs<'t> = Table<'t, (&'static str, &'static str), ()>;
type Slots<'t> = Table<'t, (u16, &'static str), ()>;

const RECORDS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("snapshots");
/// (parent, child)
const CHILDREN: TableDefinition<'_, (&str, &str), ()> = TableDefinition::new("children");
/// (slot, snapshot)
const SLOTS: TableDefinition<'_, (u16, &str), ()> = TableDefinition::new("slots");
const NUMBERS: TableDefinition<'_, &str, u64> = TableDefinition::new("numbers");

/// Key in `NUMBERS`: the directory number that was given last.
const LAST_ID: &str = "last id";
/// Key in `NUMBERS`: the form of all of this.
const FORMAT: &str = "format";
/// The form that this program writes. A commitment: a program that finds a later one stops.
const FORMAT_VERSION: u64 = 1;

/// Memory for cached pages. A node has a few hundred snapshots of a kilobyte each.
const CACHE_BYTES: usize = 4 << 20;

/// An open database.
#[derive(Debug)]
pub(super) struct Database {
    path: PathBuf,
    /// Nothing while it could not be opened again. The lock is held for writing only to open it.
    open: RwLock<Option<redb::Database>>,
}

impl Database {
    /// Opens the database, creating it if need be.
    pub(super) fn open(path: &Path) -> Result<Self, SnapshotError> {
        let open = RwLock::new(Some(open(path)?));
        Ok(Self { path: path.to_owned(), open })
    }

    /// Looks at one state of all snapshots.
    pub(super) fn read<T>(&self, look: impl Fn(&View) -> Result<T, SnapshotError>) -> Result<T, SnapshotError> {
        self.recovering(|database| {
            let transaction = database.begin_read().map_err(failed("read"))?;
            let records = transaction.open_table(RECORDS).map_err(failed("read"))?;
            let slots = transaction.open_table(SLOTS).map_err(failed("read"))?;
            look(&View { records, slots })
        })
    }

    /// Changes snapshots: everything if `change` succeeds, else nothing. May be called twice.
    pub(super) fn write<T>(
        &self,
        change: impl Fn(&mut Edit<'_>) -> Result<T, SnapshotError>,
    ) -> Result<T, SnapshotError> {
        self.recovering(|database| {
            let mut transaction = database.begin_write().map_err(failed("change"))?;
            transaction.set_durability(Durability::Immediate).map_err(failed("change"))?;
            let result = change(&mut Edit::new(&transaction)?)?;
            transaction.commit().map_err(failed("commit"))?;
            Ok(result)
        })
    }

    /// Runs `work`, and once more after opening the database anew if it was closed by an earlier failure.
    fn recovering<T>(&self, work: impl Fn(&redb::Database) -> Result<T, SnapshotError>) -> Result<T, SnapshotError> {
        if let Some(database) = &*self.open.read() {
            match work(database) {
                Err(SnapshotError::Database { cause, .. }) if matches!(*cause, redb::Error::PreviousIo) => {}
                result => return result,
            }
        }
        let mut place = self.open.write();
        // Closed first: the file has one opener at a time.
        drop(place.take());
        let database = open(&self.path)?;
        let result = work(&database);
        *place = Some(database);
        result
    }
}

fn open(path: &Path) -> Result<redb::Database, SnapshotError> {
    let database = redb::Database::builder().set_cache_size(CACHE_BYTES).create(path).map_err(failed("open"))?;
    match format(&database)? {
        Some(FORMAT_VERSION) => Ok(database),
        Some(found) => Err(SnapshotError::Format { path: path.to_owned(), found, expected: FORMAT_VERSION }),
        None => {
            let transaction = database.begin_write().map_err(failed("create"))?;
            // Its tables come to be by being opened.
            Edit::new(&transaction)?.numbers.insert(FORMAT, FORMAT_VERSION).map_err(failed("create"))?;
            transaction.commit().map_err(failed("create"))?;
            Ok(database)
        }
    }
}

/// The form of a database; none if it is new.
fn format(database: &redb::Database) -> Result<Option<u64>, SnapshotError> {
    let transaction = database.begin_read().map_err(failed("open"))?;
    let numbers = match transaction.open_table(NUMBERS) {
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(None),
        numbers => numbers.map_err(failed("open"))?,
    };
    Ok(numbers.get(FORMAT).map_err(failed("open"))?.map(|number| number.value()))
}

/// One state of all snapshots.
pub(super) struct View {
    records: redb::ReadOnlyTable<&'static str, &'static [u8]>,
    slots: redb::ReadOnlyTable<(u16, &'static str), ()>,
}

impl View {
    pub(super) fn get(&self, name: &str) -> Result<Option<Record>, SnapshotError> {
        get(&self.records, name)
    }

    /// All snapshots in the order of their names.
    pub(super) fn all(&self) -> Result<Vec<(String, Record)>, SnapshotError> {
        let entries = self.records.iter().map_err(failed("list"))?;
        entries
            .map(|entry| {
                let (name, bytes) = entry.map_err(failed("list"))?;
                let record = decode(name.value(), bytes.value())?;
                Ok((name.value().to_owned(), record))
            })
            .collect()
    }

    /// The snapshot `name` and all below it, from the top down.
    pub(super) fn chain(&self, name: &str) -> Result<Vec<(String, Record)>, SnapshotError> {
        let (mut chain, mut next) = (Vec::new(), Some(name.to_owned()));
        while let Some(name) = next.take() {
            let found = self.get(&name)?;
            let record = found.ok_or_else(|| SnapshotError::NotFound { key: name.clone() })?;
            next.clone_from(&record.parent);
            chain.push((name, record));
        }
        Ok(chain)
    }

    pub(super) fn slot_is_used(&self, slot: u16) -> Result<bool, SnapshotError> {
        let mut range = self.slots.range((slot, "")..).map_err(failed("read"))?;
        let first = range.next().transpose().map_err(failed("read"))?;
        Ok(first.is_some_and(|(key, _)| key.value().0 == slot))
    }
}

/// A change in progress.
pub(super) struct Edit<'t> {
    records: Records<'t>,
    children: Pairs<'t>,
    slots: Slots<'t>,
    numbers: Table<'t, &'static str, u64>,
}

impl<'t> Edit<'t> {
    fn new(transaction: &'t WriteTransaction) -> Result<Self, SnapshotError> {
        Ok(Self {
            records: transaction.open_table(RECORDS).map_err(failed("change"))?,
            children: transaction.open_table(CHILDREN).map_err(failed("change"))?,
            slots: transaction.open_table(SLOTS).map_err(failed("change"))?,
            numbers: transaction.open_table(NUMBERS).map_err(failed("change"))?,
        })
    }

    pub(super) fn get(&self, name: &str) -> Result<Option<Record>, SnapshotError> {
        get(&self.records, name)
    }

    /// A number that no directory ever had.
    pub(super) fn next_id(&mut self) -> Result<u64, SnapshotError> {
        let last = self.numbers.get(LAST_ID).map_err(failed("read"))?.map_or(0, |number| number.value());
        self.numbers.insert(LAST_ID, last + 1).map_err(failed("change"))?;
        Ok(last + 1)
    }

    /// Stores a record. One under the same name must have the same parent and content.
    pub(super) fn put(&mut self, name: &str, record: &Record) -> Result<(), SnapshotError> {
        let bytes = serde_json::to_vec(record).expect("a record is text and numbers");
        self.records.insert(name, bytes.as_slice()).map_err(failed("change"))?;
        if let Some(parent) = &record.parent {
            self.children.insert((parent.as_str(), name), ()).map_err(failed("change"))?;
        }
        if let Some(slot) = record.slot() {
            self.slots.insert((slot, name), ()).map_err(failed("change"))?;
        }
        Ok(())
    }

    pub(super) fn remove(&mut self, name: &str, record: &Record) -> Result<(), SnapshotError> {
        self.records.remove(name).map_err(failed("change"))?;
        if let Some(parent) = &record.parent {
            self.children.remove((parent.as_str(), name)).map_err(failed("change"))?;
        }
        if let Some(slot) = record.slot() {
            self.slots.remove((slot, name)).map_err(failed("change"))?;
        }
        Ok(())
    }

    /// One of the snapshots above `name`.
    pub(super) fn child(&self, name: &str) -> Result<Option<String>, SnapshotError> {
        let mut range = self.children.range((name, "")..).map_err(failed("read"))?;
        let first = range.next().transpose().map_err(failed("read"))?;
        Ok(first.and_then(|(key, _)| (key.value().0 == name).then(|| key.value().1.to_owned())))
    }

    /// The numbers of all snapshots.
    pub(super) fn ids(&self) -> Result<Vec<u64>, SnapshotError> {
        let entries = self.records.iter().map_err(failed("list"))?;
        entries
            .map(|entry| {
                let (name, bytes) = entry.map_err(failed("list"))?;
                Ok(decode(name.value(), bytes.value())?.id)
            })
            .collect()
    }
}

fn get(records: &impl ReadableTable<&'static str, &'static [u8]>, name: &str) -> Result<Option<Record>, SnapshotError> {
    let bytes = records.get(name).map_err(failed("read"))?;
    bytes.map(|bytes| decode(name, bytes.value())).transpose()
}

fn decode(name: &str, bytes: &[u8]) -> Result<Record, SnapshotError> {
    serde_json::from_slice(bytes).map_err(|cause| SnapshotError::Record { key: name.to_owned(), cause })
}

fn failed<E: Into<redb::Error>>(operation: &'static str) -> impl FnOnce(E) -> SnapshotError {
    move |cause| SnapshotError::Database { operation, cause: Box::new(cause.into()) }
}
