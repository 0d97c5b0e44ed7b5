//! OCI layout directories: reading images, and keeping local indexes.
//!
//! The directory is the interchange format of the image specification, and at the same time the store in which indexes
//! wait to be pushed: other tools can read it. Writers are safe against each other and against being killed: a blob is
//! written under another name in its own directory and then renamed, index.json is replaced in one step, and a writer
//! holds an advisory lock. Invariants: a file under `blobs/` is complete and is what its name says; index.json never
//! names a manifest that was not stored before; entries and fields of other tools survive as they are.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Read, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use serde_json::{Map, Value, json};

use crate::format::digest::{Digest, Hasher};
use crate::format::limits::Limits;
use crate::format::model::{Descriptor, ImageIndex, annotation, media_type};
use crate::image::store::{Located, Store, StoreError};

const VERSION: &str = "1.0.0";
/// How deep indexes may hold indexes when what they need is collected.
const DEPTH_MAX: usize = 8;

/// An OCI layout directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    directory: PathBuf,
}

/// A layout that only we may change, until this is dropped.
#[derive(Debug)]
pub struct LayoutWriter {
    layout: Layout,
    /// The lock ends with the file.
    _lock: File,
}

impl Layout {
    /// Opens a layout that exists.
    ///
    /// # Errors
    /// [`StoreError::NotALayout`] when it does not.
    pub fn open(directory: &Path) -> Result<Self, StoreError> {
        let refuse = |reason: String| StoreError::NotALayout { path: directory.to_owned(), reason };
        let marker = directory.join("oci-layout");
        let text = read_bounded(&marker, "oci-layout")?.ok_or_else(|| refuse("it lacks the file oci-layout".into()))?;
        let document: Value = serde_json::from_slice(&text).map_err(|error| refuse(format!("oci-layout: {error}")))?;
        match document.get("imageLayoutVersion").and_then(Value::as_str) {
            Some(version) if version.starts_with("1.") => Ok(Self { directory: directory.to_owned() }),
            Some(version) => Err(refuse(format!("version {version:?} is not known"))),
            None => Err(refuse("oci-layout names no version".into())),
        }
    }

    /// Opens a layout, or makes an empty one.
    ///
    /// # Errors
    /// [`StoreError`] when the directory cannot be made or holds something else.
    pub fn open_or_create(directory: &Path) -> Result<Self, StoreError> {
        if directory.join("oci-layout").exists() {
            return Self::open(directory);
        }
        refuse_foreign(directory)?;
        let blobs = directory.join("blobs/sha256");
        fs::create_dir_all(&blobs).map_err(|error| StoreError::io(&blobs, "cannot create", &error))?;
        let layout = Self { directory: directory.to_owned() };
        // Another process may be creating it, too.
        let _writer = layout.lock()?;
        if !directory.join("index.json").exists() {
            layout.replace("index.json", &to_bytes(&empty_index()))?;
        }
        layout.replace("oci-layout", format!(r#"{{"imageLayoutVersion":"{VERSION}"}}"#).as_bytes())?;
        Ok(layout)
    }

    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The entries of index.json.
    ///
    /// # Errors
    /// [`StoreError`] when it cannot be read.
    pub fn entries(&self) -> Result<Vec<Descriptor>, StoreError> {
        Store::entries(self)
    }

    /// Where a blob is, or would be.
    #[must_use]
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.directory.join("blobs").join(digest.algorithm().name()).join(digest.hex())
    }

    /// Whether a blob is there.
    #[must_use]
    pub fn has_blob(&self, digest: &Digest) -> bool {
        self.blob_path(digest).is_file()
    }

    /// Takes the layout for writing; waits while another process or thread has it.
    ///
    /// Hold the writer from the first blob to the manifest that needs it: a blob that no manifest names yet is safe
    /// from [`LayoutWriter::remove_manifest`] only while the lock is held.
    ///
    /// # Errors
    /// [`StoreError::Io`] when the lock file cannot be made.
    pub fn lock(&self) -> Result<LayoutWriter, StoreError> {
        let path = self.directory.join(".lock");
        let open = File::options().create(true).truncate(false).write(true).open(&path);
        let lock = open.map_err(|error| StoreError::io(&path, "cannot open", &error))?;
        lock.lock().map_err(|error| StoreError::io(&path, "cannot lock", &error))?;
        Ok(LayoutWriter { layout: self.clone(), _lock: lock })
    }

    /// Stores a blob whose digest is known beforehand, without taking the layout for writing: for what arrives slowly.
    /// A clean-up may take it away until a manifest in index.json names it.
    ///
    /// # Errors
    /// [`StoreError`] when it cannot be read or written, or is something else.
    pub(crate) fn add_early(&self, digest: &Digest, mut content: impl Read) -> Result<(), StoreError> {
        let directory = self.directory.join("blobs").join(digest.algorithm().name());
        let failed = |error: io::Error| StoreError::io(&directory, "cannot write a blob", &error);
        fs::create_dir_all(&directory).map_err(failed)?;
        let mut file = temporary(&directory).map_err(failed)?;
        let mut hasher = Hasher::new(digest.algorithm());
        let mut buffer = vec![0; 1 << 16];
        loop {
            let count = match content.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(failed(error)),
            };
            let piece = buffer.get(..count).unwrap_or_default();
            hasher.update(piece);
            file.write_all(piece).map_err(failed)?;
        }
        let found = hasher.finish();
        if found != *digest {
            return Err(self.wrong_digest(digest, found));
        }
        persist(file, &self.blob_path(digest))
    }

    /// Replaces a file of the layout in one step.
    pub(crate) fn replace(&self, name: &str, content: &[u8]) -> Result<(), StoreError> {
        let failed = |error: io::Error| StoreError::io(&self.directory.join(name), "cannot write", &error);
        let mut file = temporary(&self.directory).map_err(failed)?;
        file.write_all(content).map_err(failed)?;
        persist(file, &self.directory.join(name))
    }
}

impl Store for Layout {
    fn path(&self) -> &Path {
        &self.directory
    }

    fn index_bytes(&self) -> Result<Bytes, StoreError> {
        read_bounded(&self.directory.join("index.json"), "index.json")?.ok_or_else(|| StoreError::NotALayout {
            path: self.directory.clone(),
            reason: "it lacks the file index.json".to_owned(),
        })
    }

    fn locate(&self, digest: &Digest) -> Result<Option<Located>, StoreError> {
        let path = self.blob_path(digest);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(StoreError::io(&path, "cannot open", &error)),
        };
        let length = file.metadata().map_err(|error| StoreError::io(&path, "cannot read", &error))?.len();
        Ok(Some(Located::file(&Arc::new(file), 0, length)))
    }
}

impl LayoutWriter {
    /// Stores a blob, unless it is there.
    ///
    /// # Errors
    /// [`StoreError::Io`] when it cannot be written.
    pub fn add_blob(&mut self, content: &[u8]) -> Result<Digest, StoreError> {
        let digest = Digest::of(content);
        if !self.layout.has_blob(&digest) {
            self.copy_blob(&digest, content)?;
        }
        Ok(digest)
    }

    /// Stores a blob whose digest is known beforehand.
    ///
    /// # Errors
    /// [`StoreError`] when it cannot be read or written, or is something else.
    pub(crate) fn copy_blob(&mut self, digest: &Digest, content: impl Read) -> Result<(), StoreError> {
        self.layout.add_early(digest, content)
    }

    /// Stores a manifest and puts `entry` in index.json, whose digest and size are set here. An entry of the same
    /// digest is replaced; an entry of another manifest with the same tag loses that tag.
    ///
    /// # Errors
    /// [`StoreError`] when it cannot be written, or index.json cannot be read.
    pub fn add_manifest(&mut self, mut entry: Descriptor, content: &[u8]) -> Result<Descriptor, StoreError> {
        entry.digest = self.add_blob(content)?;
        entry.size = content.len() as u64;
        let new = serde_json::to_value(&entry).map_err(|error| self.malformed(&error.to_string()))?;
        let tag = entry.annotations.get(annotation::REF_NAME).cloned();
        self.change_index(|entries| {
            for listed in entries.iter_mut().filter(|listed| !names(listed, &entry.digest)) {
                let Some(annotations) = listed.get_mut("annotations").and_then(Value::as_object_mut) else { continue };
                let theirs = annotations.get(annotation::REF_NAME).and_then(Value::as_str);
                if tag.is_some() && theirs == tag.as_deref() {
                    annotations.shift_remove(annotation::REF_NAME);
                }
            }
            match entries.iter_mut().find(|listed| names(listed, &entry.digest)) {
                Some(listed) => *listed = new,
                None => entries.push(new),
            }
        })?;
        Ok(entry)
    }

    /// Takes a manifest out of index.json and deletes the blobs that nothing else needs. Answers which were deleted;
    /// none if index.json does not name it.
    ///
    /// # Errors
    /// [`StoreError`] when index.json cannot be read or written, or a file cannot be deleted.
    pub fn remove_manifest(&mut self, digest: &Digest) -> Result<Vec<Digest>, StoreError> {
        let (gone, kept): (Vec<_>, Vec<_>) =
            self.layout.entries()?.into_iter().partition(|entry| entry.digest == *digest);
        if gone.is_empty() {
            return Ok(Vec::new());
        }
        // The removed manifest may be damaged: it goes all the same. If another one is, its parts are unknown, and all
        // parts stay.
        let mut garbage: Vec<Digest> = match (self.needs(&gone), self.needs(&kept)) {
            (Ok(all), Ok(needed)) => all.into_iter().filter(|part| !needed.contains(part)).collect(),
            (Err(_), Ok(needed)) => Some(*digest).filter(|digest| !needed.contains(digest)).into_iter().collect(),
            (_, Err(error)) => {
                tracing::warn!(%error, "the parts of {digest} stay: they may be needed");
                Some(*digest).filter(|digest| !kept.iter().any(|entry| entry.digest == *digest)).into_iter().collect()
            }
        };
        garbage.sort_unstable();
        // First the name, then the content: a cut in between leaves unnamed blobs, never a name without content.
        self.change_index(|entries| entries.retain(|listed| !names(listed, digest)))?;
        for digest in &garbage {
            let path = self.layout.blob_path(digest);
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(StoreError::io(&path, "cannot delete", &error));
                }
                _ => {}
            }
        }
        Ok(garbage)
    }

    /// Everything that `roots` reach.
    fn needs(&self, roots: &[Descriptor]) -> Result<HashSet<Digest>, StoreError> {
        let mut needed = HashSet::new();
        let mut open: Vec<(Descriptor, usize)> = roots.iter().map(|root| (root.clone(), 0)).collect();
        while let Some((descriptor, depth)) = open.pop() {
            let known = media_type::is_manifest(&descriptor.media_type) || descriptor.is_index();
            if !needed.insert(descriptor.digest) || !known || depth > DEPTH_MAX {
                continue;
            }
            // A child that is absent (a sparse index) needs nothing.
            let Some(raw) = self.layout.manifest(&descriptor)? else { continue };
            let children: Vec<Descriptor> = if descriptor.is_index() {
                self.parse::<ImageIndex>(&raw.bytes)?.manifests
            } else {
                let manifest: crate::format::model::ImageManifest = self.parse(&raw.bytes)?;
                needed.insert(manifest.config.digest);
                needed.extend(manifest.layers.iter().map(|layer| layer.digest));
                Vec::new()
            };
            open.extend(children.into_iter().map(|child| (child, depth + 1)));
        }
        Ok(needed)
    }

    /// Edits index.json: its other fields, and the entries that `change` leaves alone, stay as they are.
    fn change_index(&self, change: impl FnOnce(&mut Vec<Value>)) -> Result<(), StoreError> {
        let mut document: Map<String, Value> = self.parse(&self.layout.index_bytes()?)?;
        let entries = document.entry("manifests").or_insert_with(|| json!([]));
        if entries.is_null() {
            *entries = json!([]);
        }
        let Value::Array(entries) = entries else { return Err(self.malformed("its manifests are no list")) };
        change(entries);
        self.layout.replace("index.json", &to_bytes(&Value::Object(document)))
    }

    fn parse<T: serde::de::DeserializeOwned>(&self, bytes: &[u8]) -> Result<T, StoreError> {
        serde_json::from_slice(bytes).map_err(|error| self.malformed(&error.to_string()))
    }

    fn malformed(&self, reason: &str) -> StoreError {
        let (path, what) = (self.layout.directory.clone(), "index.json or a manifest".to_owned());
        StoreError::Malformed { path, what, reason: reason.to_owned() }
    }
}

/// Stops us from strewing blobs over a directory that is used for something else.
fn refuse_foreign(directory: &Path) -> Result<(), StoreError> {
    let files = match fs::read_dir(directory) {
        Ok(files) => files,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(StoreError::io(directory, "cannot open", &error)),
    };
    for file in files {
        let name = file.map_err(|error| StoreError::io(directory, "cannot read", &error))?.file_name();
        let name = name.to_string_lossy();
        // What a layout that is being made may hold already.
        if !matches!(&*name, "blobs" | "index.json" | ".lock" | "oci-layout") && !name.starts_with(".new-") {
            let reason = format!("it holds other files, for example {name}");
            return Err(StoreError::NotALayout { path: directory.to_owned(), reason });
        }
    }
    Ok(())
}

fn names(entry: &Value, digest: &Digest) -> bool {
    entry.get("digest").and_then(Value::as_str) == Some(&digest.to_string())
}

fn empty_index() -> Value {
    json!({"schemaVersion": 2, "mediaType": media_type::INDEX, "manifests": []})
}

fn to_bytes(document: &Value) -> Vec<u8> {
    document.to_string().into_bytes()
}

/// A file that disappears if we do, readable by others once it has its name.
fn temporary(directory: &Path) -> io::Result<tempfile::NamedTempFile> {
    use std::os::unix::fs::PermissionsExt as _;
    let mode = fs::Permissions::from_mode(0o644);
    tempfile::Builder::new().prefix(".new-").permissions(mode).tempfile_in(directory)
}

/// Gives a finished file its name. The content reaches the disk first: after a crash there is no empty blob.
fn persist(file: tempfile::NamedTempFile, path: &Path) -> Result<(), StoreError> {
    let failed = |error: io::Error| StoreError::io(path, "cannot write", &error);
    file.as_file().sync_all().map_err(failed)?;
    file.persist(path).map_err(|error| failed(error.error))?;
    Ok(())
}

fn read_bounded(path: &Path, what: &str) -> Result<Option<Bytes>, StoreError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(error) => return Err(StoreError::io(path, "cannot open", &error)),
    };
    let limit = Limits::DEFAULT.manifest_bytes_max;
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(|error| StoreError::io(path, "cannot read", &error))?;
    if bytes.len() as u64 > limit {
        return Err(StoreError::TooLarge { path: path.to_owned(), what: what.to_owned(), limit });
    }
    Ok(Some(bytes.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(config: Digest, layers: &[Digest]) -> Vec<u8> {
        let layers: Vec<Value> = layers.iter().map(|digest| json!({"digest": digest, "size": 1})).collect();
        let config = json!({"mediaType": "a/b", "digest": config, "size": 2});
        json!({"schemaVersion": 2, "mediaType": media_type::MANIFEST, "config": config, "layers": layers})
            .to_string()
            .into_bytes()
    }

    fn entry(tag: &str) -> Descriptor {
        let mut entry = Descriptor::of(media_type::MANIFEST, b"");
        entry.annotations.insert(annotation::REF_NAME.into(), tag.into());
        entry
    }

    #[test]
    fn add_list_remove() {
        let directory = tempfile::tempdir().unwrap();
        let layout = Layout::open_or_create(&directory.path().join("l")).unwrap();
        let mut writer = layout.lock().unwrap();
        let config = writer.add_blob(b"{}").unwrap();
        let (shared, own) = (writer.add_blob(b"s").unwrap(), writer.add_blob(b"o").unwrap());
        let first = writer.add_manifest(entry("a"), &manifest(config, &[shared])).unwrap();
        let second = writer.add_manifest(entry("a"), &manifest(config, &[shared, own])).unwrap();
        drop(writer);
        let reopened = Layout::open_or_create(layout.directory()).unwrap();
        let listed = reopened.entries().unwrap();
        assert_eq!(listed.len(), 2);
        // The tag moved.
        assert_eq!(listed[0].annotations.get(annotation::REF_NAME), None);
        assert_eq!(listed[1], second);
        let mut writer = reopened.lock().unwrap();
        let mut expected = vec![own, second.digest];
        expected.sort_unstable();
        assert_eq!(writer.remove_manifest(&second.digest).unwrap(), expected);
        assert_eq!(writer.remove_manifest(&second.digest).unwrap(), Vec::new());
        assert!(reopened.has_blob(&shared) && reopened.has_blob(&config) && !reopened.has_blob(&own));
        assert_eq!(writer.remove_manifest(&first.digest).unwrap().len(), 3);
        assert!(reopened.entries().unwrap().is_empty());
        let left = fs::read_dir(reopened.directory().join("blobs/sha256")).unwrap().count();
        assert_eq!(left, 0);
    }

    #[test]
    fn others_fields_survive() {
        let directory = tempfile::tempdir().unwrap();
        let layout = Layout::open_or_create(directory.path()).unwrap();
        let theirs = r#"{"x":{"b":1,"a":2},"schemaVersion":2,"manifests":[{"mediaType":"q/r","size":3,"digest":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","y":[1]}],"annotations":{"k":"v"}}"#;
        fs::write(directory.path().join("index.json"), theirs).unwrap();
        let mut writer = layout.lock().unwrap();
        let added = writer.add_manifest(entry("t"), &manifest(Digest::of(b"{}"), &[])).unwrap();
        let after = fs::read_to_string(directory.path().join("index.json")).unwrap();
        let ours = serde_json::to_string(&added).unwrap();
        assert_eq!(after, theirs.replace(r#""y":[1]}]"#, &format!(r#""y":[1]}},{ours}]"#)));
        writer.remove_manifest(&added.digest).unwrap();
        assert_eq!(fs::read_to_string(directory.path().join("index.json")).unwrap(), theirs);
    }

    #[test]
    fn writers_take_turns() {
        let directory = tempfile::tempdir().unwrap();
        let layout = Layout::open_or_create(directory.path()).unwrap();
        std::thread::scope(|scope| {
            for writer in 0..8 {
                let layout = &layout;
                scope.spawn(move || {
                    for round in 0..5 {
                        let content = manifest(Digest::of(format!("{writer}.{round}").as_bytes()), &[]);
                        layout.lock().unwrap().add_manifest(entry(&format!("{writer}.{round}")), &content).unwrap();
                    }
                });
            }
        });
        assert_eq!(layout.entries().unwrap().len(), 40);
        let stray = fs::read_dir(directory.path())
            .unwrap()
            .filter(|file| file.as_ref().unwrap().file_name().to_string_lossy().starts_with(".new-"));
        assert_eq!(stray.count(), 0);
    }

    #[test]
    fn not_layouts() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("thesis.tex"), "").unwrap();
        assert!(matches!(Layout::open_or_create(directory.path()), Err(StoreError::NotALayout { .. })));
        for (marker, index) in [(None, None), (Some("{}"), None), (Some(r#"{"imageLayoutVersion":"2.0"}"#), Some("{}"))]
        {
            for (name, content) in [("oci-layout", marker), ("index.json", index)] {
                if let Some(content) = content {
                    fs::write(directory.path().join(name), content).unwrap();
                }
            }
            assert!(matches!(Layout::open(directory.path()), Err(StoreError::NotALayout { .. })), "{marker:?}");
        }
        fs::write(directory.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        fs::write(directory.path().join("index.json"), "[").unwrap();
        let layout = Layout::open(directory.path()).unwrap();
        assert!(matches!(layout.entries(), Err(StoreError::Malformed { .. })));
    }
}
