//! Which index of an image is used: a named one, the one that the image names, one that names the image.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use soci_cli::demo::registry::DemoRegistry;
use soci_fs::layer::store::Store;
use soci_fs::open::{ImageOpener, IndexModes, KeptLayer, LayerOrigin, OpenError, OpenOptions, Way, reopen_layer};
use soci_index::format::digest::Digest;
use soci_index::format::index::Compression;
use soci_index::format::limits::Limits;
use soci_index::format::manifest::{EMPTY_CONFIG, INDEX_DIGEST, INDEX_V1, INDEX_V2, SociIndex, ZtocReference};
use soci_index::format::model::{Descriptor, media_type};
use soci_index::format::platform::PlatformSelection;
use soci_index::format::reference::ManifestName;
use soci_index::image::ImageSource;
use soci_index::indexing::{Options, index_bytes};
use soci_index::registry::{Body, ClientOptions, CredentialSource, Registry, Repository};
use soci_tests::image::{GZIP, Image, tar, text};
use soci_tests::registry::client;

const SPAN_BYTES: u64 = 64 << 10;

/// An image whose manifest names a version 2 index, and to which a version 1 index refers.
struct Stage {
    registry: DemoRegistry,
    image: Image,
    /// As another tool might write it: indented.
    v2: Vec<u8>,
    v1: Vec<u8>,
}

impl Stage {
    async fn new() -> Self {
        let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
        let repository = client(&registry.host()).repository("team/app");
        let mut image = Image::gzip(vec![tar(&[("etc/motd", text(1, 300_000))])]);
        let options =
            Options { compression: Compression::Gzip, span_bytes: SPAN_BYTES, compact: None, limits: Limits::DEFAULT };
        let ztoc = index_bytes(&image.blobs[0], options).unwrap().into_ztoc().unwrap().encode().unwrap().to_vec();
        let reference = ZtocReference {
            digest: Digest::of(&ztoc),
            size: ztoc.len() as u64,
            layer: Digest::of(&image.blobs[0]),
            layer_media_type: GZIP.to_owned(),
            span_bytes: SPAN_BYTES,
            disable_xattrs: true,
        };
        let unsubjected =
            SociIndex::v1(std::slice::from_ref(&reference), &[], &Descriptor::of(media_type::MANIFEST, b"")).to_json();
        let mut v2: serde_json::Value = serde_json::from_slice(&unsubjected).unwrap();
        v2.as_object_mut().unwrap().remove("subject");
        v2["config"]["mediaType"] = INDEX_V2.into();
        let v2 = serde_json::to_vec_pretty(&v2).unwrap();
        let mut manifest: serde_json::Value = serde_json::from_slice(&image.manifest).unwrap();
        manifest["annotations"] = serde_json::json!({ INDEX_DIGEST: Digest::of(&v2).to_string() });
        image.manifest = Bytes::from(manifest.to_string());
        let v1 = SociIndex::v1(&[reference], &[], &Descriptor::of(media_type::MANIFEST, &image.manifest)).to_json();
        for blob in [&ztoc[..], EMPTY_CONFIG] {
            push_blob(&repository, blob).await;
        }
        image.push(&repository, "v1").await;
        repository.push_referrer(media_type::MANIFEST, v1.clone().into()).await.unwrap();
        let name = ManifestName::Digest(Digest::of(&v2));
        repository.push_manifest(&name, media_type::MANIFEST, v2.clone().into()).await.unwrap();
        Self { registry, image, v2, v1 }
    }

    async fn source(&self) -> ImageSource {
        let reference = format!("{}/team/app:v1", self.registry.host()).parse().unwrap();
        let options = ClientOptions {
            credentials: CredentialSource::Anonymous,
            deadline: Duration::from_secs(1),
            ..ClientOptions::default()
        };
        ImageSource::open(&reference, &options).await.unwrap()
    }

    async fn open(&self, at: &Path, options: OpenOptions) -> Result<ImageOpener, OpenError> {
        let source = self.source().await;
        let image = source.resolve(&PlatformSelection::Host).await.unwrap().remove(0);
        let store = Arc::new(Store::open(at).unwrap());
        ImageOpener::new(source, image, store, options, tokio::runtime::Handle::current()).await
    }
}

async fn push_blob(repository: &Repository, blob: &[u8]) {
    repository.push_blob(&Digest::of(blob), Body::Bytes(Bytes::copy_from_slice(blob)), None).await.unwrap();
}

fn options(modes: IndexModes) -> OpenOptions {
    OpenOptions { modes, ..OpenOptions::default() }
}

#[tokio::test]
async fn the_image_s_own_word_goes_first() {
    let stage = Stage::new().await;
    let (v1, v2) = (Digest::of(&stage.v1), Digest::of(&stage.v2));
    let missing = Digest::of(b"missing");
    for (annotated, referring, named, expected) in [
        (true, true, None, Some(v2)),
        (true, false, None, Some(v2)),
        (false, true, None, Some(v1)),
        (false, false, None, None),
        (true, true, Some(v1), Some(v1)),
        (false, false, Some(v1), Some(v1)),
    ] {
        let root = tempfile::tempdir().unwrap();
        let options = OpenOptions { index: named, ..options(IndexModes { referring, annotated }) };
        let opener = stage.open(root.path(), options).await.unwrap();
        assert_eq!(opener.index(), expected, "annotated {annotated}, referring {referring}, named {named:?}");
    }
    let root = tempfile::tempdir().unwrap();
    let wanted = OpenOptions { index: Some(missing), ..options(IndexModes::default()) };
    let error = stage.open(root.path(), wanted).await.unwrap_err();
    assert!(matches!(error, OpenError::NoSuchIndex { .. }), "{error}");
}

/// What is kept is what was fetched, byte for byte, and it suffices when the registry is gone.
#[tokio::test]
async fn an_index_is_kept_and_suffices() {
    for (modes, kind) in [
        (IndexModes { annotated: true, referring: false }, INDEX_V2),
        (IndexModes { annotated: false, referring: true }, INDEX_V1),
    ] {
        let stage = Stage::new().await;
        let raw = if kind == INDEX_V2 { &stage.v2 } else { &stage.v1 };
        let root = tempfile::tempdir().unwrap();
        let content = root.path().join("content");
        let options = OpenOptions { index_store: Some(content.clone()), ..options(modes) };
        let opener = stage.open(root.path(), options.clone()).await.unwrap();
        let blob = content.join("blobs/sha256").join(Digest::of(raw).hex());
        assert_eq!(&std::fs::read(blob).unwrap(), raw);
        let layer = opener.image().manifest.layers[0].clone();
        let opened = opener.open_layer(&layer, Digest::of(&stage.image.tars[0])).await.unwrap();
        assert_eq!(opened.note.way, Way::Lazy);
        opened.reader.fetching().complete().await.unwrap();
        let (image, claim) = (stage.source().await, opened.claim);
        drop((opened, opener, stage.registry));
        let store = Arc::new(Store::open(root.path()).unwrap());
        let kept = KeptLayer { claim, origins: vec![LayerOrigin { image, layer, index_from: None }] };
        let runtime = tokio::runtime::Handle::current();
        let reader = reopen_layer(&kept, &store, &options, &runtime).await.unwrap().unwrap();
        let length = usize::try_from(reader.index().uncompressed_size).unwrap();
        assert_eq!(reader.read(0, length).await.unwrap(), stage.image.tars[0][..length]);
    }
}

/// An index in another repository is asked for first and read from there, zTOCs too; one that cannot be asked costs a
/// line in the log.
#[tokio::test]
async fn an_index_may_be_elsewhere() {
    let stage = Stage::new().await;
    let elsewhere = DemoRegistry::start(Duration::ZERO).await.unwrap();
    let others = client(&elsewhere.host()).repository("soci/index");
    // Another span size makes another index.
    let options_64 =
        Options { compression: Compression::Gzip, span_bytes: SPAN_BYTES / 2, compact: None, limits: Limits::DEFAULT };
    let ztoc = index_bytes(&stage.image.blobs[0], options_64).unwrap().into_ztoc().unwrap().encode().unwrap().to_vec();
    let reference = ZtocReference {
        digest: Digest::of(&ztoc),
        size: ztoc.len() as u64,
        layer: Digest::of(&stage.image.blobs[0]),
        layer_media_type: GZIP.to_owned(),
        span_bytes: SPAN_BYTES / 2,
        disable_xattrs: true,
    };
    let index =
        SociIndex::v1(&[reference], &[], &Descriptor::of(media_type::MANIFEST, &stage.image.manifest)).to_json();
    push_blob(&others, &ztoc).await;
    push_blob(&others, EMPTY_CONFIG).await;
    others.push_referrer(media_type::MANIFEST, index.clone().into()).await.unwrap();

    let gone = DemoRegistry::start(Duration::ZERO).await.unwrap();
    let quick = ClientOptions {
        credentials: CredentialSource::Anonymous,
        deadline: Duration::from_millis(200),
        ..ClientOptions::default()
    };
    let silent = Registry::new(&gone.host(), quick).unwrap().repository("soci/index");
    drop(gone);
    let (ours, theirs) = (Digest::of(&stage.v1), Digest::of(&index));
    let named = |index_repositories: &[&Repository], annotated| OpenOptions {
        index_repositories: index_repositories.iter().map(|repository| (*repository).clone()).collect(),
        ..options(IndexModes { referring: true, annotated })
    };
    for (options, expected) in [
        (named(&[&others], false), theirs),
        (named(&[&silent, &others], false), theirs),
        (named(&[&silent], false), ours),
        // The operator's word goes before that of the image.
        (named(&[&others], true), theirs),
        (named(&[&silent], true), Digest::of(&stage.v2)),
        (OpenOptions { index: Some(theirs), ..named(&[&others], true) }, theirs),
        (OpenOptions { index: Some(ours), ..named(&[&others], true) }, ours),
    ] {
        for with_store in [true, false] {
            let root = tempfile::tempdir().unwrap();
            let index_store = with_store.then(|| root.path().join("content"));
            let opener = stage.open(root.path(), OpenOptions { index_store, ..options.clone() }).await.unwrap();
            assert_eq!(opener.index(), Some(expected), "{options:?}");
            let layer = opener.image().manifest.layers[0].clone();
            let opened = opener.open_layer(&layer, Digest::of(&stage.image.tars[0])).await.unwrap();
            assert_eq!(opened.note.way, Way::Lazy, "{options:?}");
            let read = opened.reader.read(0, stage.image.tars[0].len()).await.unwrap();
            assert_eq!(read, stage.image.tars[0], "{options:?}");
        }
    }
}
