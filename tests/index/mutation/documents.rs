//! Mutations of zTOCs, of documents of registries, and of texts that users type.

use std::fmt::Debug;

use bytes::Bytes;
use soci_index::format::digest::Digest;
use soci_index::format::limits::Limits;
use soci_index::format::manifest::{Prefetch, SociIndex};
use soci_index::format::model::{ImageConfig, ImageIndex, ImageManifest};
use soci_index::format::platform::Platform;
use soci_index::format::reference::Reference;
use soci_index::format::ztoc::{Ztoc, rfc3339};
use soci_index::registry::challenge;
use soci_tests::golden::golden;

use super::{Random, check_image, fuzz, mutate, read_files};

/// zTOCs: decoded or refused; what was decoded survives encoding; reading ends with bytes or an error.
#[test]
fn ztocs_are_read_or_refused() {
    let mut corpus: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
    for case in soci_tests::golden::cases().into_iter().filter(|case| case.layer.len() < 60_000) {
        let ztocs = case.ztocs.into_values().filter(|ztoc| ztoc.len() < 150_000);
        corpus.extend(ztocs.map(|ztoc| (ztoc, case.layer.clone())));
    }
    let digest = Digest::of(b"");
    let make = |random: &mut Random| {
        let (mut damaged, other) = (random.pick(&corpus).0.clone(), &random.pick(&corpus).0);
        // The middle is windows; what is worth damaging stands at both ends.
        let ends = 4096.min(damaged.len() / 2);
        let (mut head, mut tail) = (damaged[..ends].to_vec(), damaged.split_off(damaged.len() - ends));
        let kept = damaged.split_off(ends.min(damaged.len()));
        let part = if random.below(2) == 0 { &mut head } else { &mut tail };
        mutate(part, other, random);
        [head, kept, tail].concat()
    };
    fuzz("zTOCs", make, |bytes, random| {
        let bytes = Bytes::copy_from_slice(bytes);
        let Ok(ztoc) = Ztoc::decode(&bytes, &Limits::DEFAULT) else { return };
        let again = ztoc.encode().unwrap().to_vec();
        assert!(Ztoc::decode(&Bytes::from(again), &Limits::DEFAULT).unwrap() == ztoc, "read, written and read");
        let plan = soci_index::format::prefetch::plan(&[(digest, &ztoc)], &["a".to_owned(), "usr/bin/env".to_owned()]);
        assert!(plan.layers.len() <= 1);
        let _ = (ztoc.span_of(random.next()), ztoc.has_no_xattrs());
        let size = ztoc.compressed_size;
        let layer = corpus.iter().map(|(_, layer)| layer).find(|layer| i64::try_from(layer.len()) == Ok(size));
        let Some(layer) = layer else { return };
        if let Ok(index) = ztoc.into_index(layer.len() as u64, &Limits::DEFAULT) {
            let _ = read_files(&index, layer);
            check_image(&index);
        }
    });
}

/// All JSON documents of the golden images, by their looks.
fn documents() -> Vec<Vec<u8>> {
    fn collect(directory: &std::path::Path, documents: &mut Vec<Vec<u8>>) {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                collect(&path, documents);
            } else if let Ok(bytes) = std::fs::read(&path)
                && bytes.len() < 20_000
                && bytes.first() == Some(&b'{')
            {
                documents.push(bytes);
            }
        }
    }
    let mut documents = Vec::new();
    collect(&golden().join("images"), &mut documents);
    assert!(documents.len() > 20, "{} documents", documents.len());
    documents
}

/// JSON documents: read or refused; an index that was read is written and read the same.
#[test]
fn documents_are_read_or_refused() {
    let corpus = documents();
    let make = |random: &mut Random| {
        let mut document = random.pick(&corpus).clone();
        let other = random.pick(&corpus);
        mutate(&mut document, other, random);
        document
    };
    fuzz("documents", make, |bytes, _| {
        if let Ok(index) = SociIndex::parse(bytes, &Limits::DEFAULT) {
            assert_eq!(SociIndex::parse(&index.to_json(), &Limits::DEFAULT).unwrap(), index);
            assert!(index.ztocs().all(|(layer, _)| index.ztoc(&layer).is_some()));
        }
        if let Ok(prefetch) = Prefetch::parse(bytes, &Limits::DEFAULT) {
            assert_eq!(Prefetch::parse(&prefetch.to_json(), &Limits::DEFAULT).unwrap(), prefetch);
        }
        let _ = serde_json::from_slice::<ImageManifest>(bytes).map(|manifest| manifest.kind().len());
        let _ = serde_json::from_slice::<ImageIndex>(bytes);
        let _ = serde_json::from_slice::<ImageConfig>(bytes);
    });
}

const TEXTS: [&str; 16] = [
    "registry.example:5000/team/app:v1",
    "docker.io/library/debian@sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "[2001:db8::1]:5000/a/b:c",
    "oci:/some/where:tag",
    "oci-archive:file.tar:v1",
    "debian",
    "linux/arm64/v8",
    "windows/amd64",
    "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "sha512:cf83e1357eefb8bdf1542850d66d8007d620e4050b5715dc83f4a921d36ce9ce47d0d13c5d85f2b0ff8318d2877eec2f63b931bd47417a81a538327af927da3e",
    "2020-09-13T12:26:40.123456789+09:30",
    "1969-12-31T23:59:59Z",
    "Bearer realm=\"https://auth.example/token\",service=\"registry\",scope=\"repository:a/b:pull,push\"",
    "Basic realm=\"a \\\"quoted\\\" name\", Bearer realm=x , error=\"insufficient_scope\"",
    "Negotiate dG9rZW4=, Digest a=b",
    "",
];

/// What was read is written as a text that reads the same.
fn check_text<T: std::str::FromStr + ToString + PartialEq + Debug>(text: &str) {
    if let Ok(value) = text.parse::<T>() {
        let again = value.to_string();
        assert_eq!(again.parse::<T>().ok(), Some(value), "{text:?} became {again:?}");
    }
}

/// References, platforms, digests, times and challenges.
#[test]
fn texts_are_read_or_refused() {
    let make = |random: &mut Random| {
        let mut text = random.pick(&TEXTS).as_bytes().to_vec();
        let other = random.pick(&TEXTS).as_bytes();
        mutate(&mut text, other, random);
        text
    };
    fuzz("texts", make, |bytes, _| {
        if let Some(time) = rfc3339::parse(bytes) {
            let text = rfc3339::format(time);
            assert!(text.is_empty() || rfc3339::parse(text.as_bytes()) == Some(time), "{text}");
        }
        let text = String::from_utf8_lossy(bytes);
        check_text::<Reference>(&text);
        check_text::<Platform>(&text);
        check_text::<Digest>(&text);
        for challenge in challenge::parse([&*text, "Basic realm=x"]) {
            let _ = (challenge.parameter("realm"), challenge.parameter("scope"));
        }
    });
}
