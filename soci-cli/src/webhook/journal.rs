//! What was accepted and is not done, on disk: `webhook/queue.json` below the root.
//!
//! The file is written whole under a temporary name, and renamed when it is on the disk; so it is always one state or
//! the next, also after a power cut. It is small: a queue has bounds. A lock beside it keeps a second server away,
//! which would forget what the first one accepted.

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use soci_fs::layer::lock::{Lock, LockError};
use soci_fs::layer::private::ensure_private_dir;

use crate::webhook::queue::Job;

/// The form of the file. A new number when an older program would misread it.
const FORM: u32 = 1;

/// Why what was accepted cannot be kept, or is not known.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// Another server has it.
    #[error("{directory}: another server{} keeps its queue here: name another place by --root, or end that one", process(*pid))]
    Busy { directory: String, pid: Option<u32> },
    /// The disk.
    #[error("cannot {action} {path}: {cause}")]
    Io { action: &'static str, path: String, cause: io::Error },
    /// The file is not one of ours.
    #[error("{path} cannot be read as a queue ({reason}): move it away to start with an empty one")]
    Malformed { path: String, reason: String },
}

fn process(pid: Option<u32>) -> String {
    pid.map(|pid| format!(" (process {pid})")).unwrap_or_default()
}

#[derive(Debug, Serialize, Deserialize)]
struct File {
    form: u32,
    jobs: Vec<Job>,
}

/// The file, and the lock on it.
#[derive(Debug)]
pub struct Journal {
    directory: PathBuf,
    _lock: Lock,
}

impl Journal {
    /// Opens the journal below a root, and reads what is left to do.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn open(root: &Path) -> Result<(Self, Vec<Job>), JournalError> {
        let directory = root.join("webhook");
        ensure_private_dir(&directory).map_err(|error| failed("use", &directory)(error.into()))?;
        let lock = directory.join("lock");
        let lock = Lock::take(&lock).map_err(|error| match error {
            LockError::Busy { pid } => JournalError::Busy { directory: directory.display().to_string(), pid },
            LockError::Io { action, cause } => failed(action, &lock)(cause),
        })?;
        let journal = Self { directory, _lock: lock };
        let jobs = journal.read()?;
        Ok((journal, jobs))
    }

    fn path(&self) -> PathBuf {
        self.directory.join("queue.json")
    }

    fn read(&self) -> Result<Vec<Job>, JournalError> {
        let path = self.path();
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed("read", &path)(error)),
        };
        let malformed = |reason: String| JournalError::Malformed { path: path.display().to_string(), reason };
        let file: File = serde_json::from_slice(&text).map_err(|error| malformed(error.to_string()))?;
        if file.form != FORM {
            return Err(malformed(format!("it has form {}, and this program knows {FORM}", file.form)));
        }
        // Whether a job was running when the last server ended is unknown: it runs again.
        Ok(file.jobs.into_iter().map(|job| Job { begun: true, ..job }).collect())
    }

    /// Puts this state in the place of the one before. When it returns, it is on the disk.
    ///
    /// # Errors
    /// [`JournalError::Io`]; the file is as it was.
    pub fn write(&self, jobs: Vec<Job>) -> Result<(), JournalError> {
        let path = self.path();
        let text = serde_json::to_vec_pretty(&File { form: FORM, jobs });
        let text = text.map_err(|error| failed("write", &path)(error.into()))?;
        let new = tempfile::Builder::new().prefix(".queue-").tempfile_in(&self.directory);
        let mut new = new.map_err(failed("create a file in", &self.directory))?;
        let written = new.write_all(&text).and_then(|()| new.as_file().sync_all());
        written.map_err(failed("write", new.path()))?;
        new.persist(&path).map_err(|error| failed("rename", &path)(error.error))?;
        // The name is on the disk when the directory is.
        let directory = std::fs::File::open(&self.directory).and_then(|directory| directory.sync_all());
        directory.map_err(failed("write", &self.directory))
    }
}

fn failed<'a>(action: &'static str, path: &'a Path) -> impl Fn(io::Error) -> JournalError + 'a {
    move |cause| JournalError::Io { action, path: path.display().to_string(), cause }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::webhook::event::Push;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn job(tag: &str) -> Job {
        Job { push: Push::new("team/app", tag, DIGEST).unwrap(), attempts: 1, due: 77, rests: true, begun: true }
    }

    #[test]
    fn what_is_written_is_read() {
        let root = tempfile::tempdir().unwrap();
        let (journal, jobs) = Journal::open(root.path()).unwrap();
        assert_eq!(jobs, []);
        journal.write(vec![job("a"), job("b")]).unwrap();
        let busy = Journal::open(root.path()).unwrap_err().to_string();
        assert!(busy.contains(&format!("(process {})", std::process::id())) && busy.contains("--root"), "{busy}");
        drop(journal);
        let (journal, jobs) = Journal::open(root.path()).unwrap();
        assert_eq!(jobs, [job("a"), job("b")]);
        journal.write(Vec::new()).unwrap();
        let files: Vec<_> = std::fs::read_dir(root.path().join("webhook")).unwrap().collect();
        assert_eq!(files.len(), 2, "{files:?}");
    }

    #[test]
    fn what_is_no_queue_is_not_overwritten() {
        for (text, reason) in [
            ("", "EOF"),
            (r#"{"form":2,"jobs":[]}"#, "form 2"),
            (r#"{"form":1,"jobs":[{"repository":"../x","tag":"v1","digest":"sha256:00"}]}"#, "no reference"),
        ] {
            let root = tempfile::tempdir().unwrap();
            let file = root.path().join("webhook/queue.json");
            std::fs::create_dir(root.path().join("webhook")).unwrap();
            std::fs::write(&file, text).unwrap();
            let error = Journal::open(root.path()).unwrap_err().to_string();
            assert!(error.contains(reason) && error.contains("move it away"), "{text}: {error}");
            assert_eq!(std::fs::read_to_string(file).unwrap(), text);
        }
    }

    #[test]
    fn a_disk_that_does_not_take_it() {
        let root = tempfile::tempdir().unwrap();
        let (journal, _) = Journal::open(root.path()).unwrap();
        journal.write(vec![job("a")]).unwrap();
        std::fs::remove_dir_all(root.path().join("webhook")).unwrap();
        let error = journal.write(vec![job("b")]).unwrap_err();
        assert!(error.to_string().contains("cannot create a file in"), "{error}");
    }
}
