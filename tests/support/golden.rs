//! Reads the golden directory.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use soci_index::format::index::Compression;

/// One layer and what AWS made of it.
#[derive(Debug)]
pub struct Case {
    pub name: String,
    pub layer: Vec<u8>,
    pub compression: Compression,
    /// Span size -> zTOC.
    pub ztocs: BTreeMap<u64, Vec<u8>>,
    /// Whether AWS's snapshotter accepts its own zTOC.
    pub aws_reads_it: bool,
    pub tar_sha256: Option<String>,
    pub files: Vec<File>,
}

/// A line of files.tsv.
#[derive(Debug)]
pub struct File {
    pub path: String,
    pub kind: String,
    pub sha256: String,
}

pub fn golden() -> PathBuf {
    std::env::var_os("SOCI_GOLDEN").map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("golden"), PathBuf::from)
}

pub fn cases() -> Vec<Case> {
    let mut directories: Vec<PathBuf> = std::fs::read_dir(golden())
        .expect("the golden directory")
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            path.join("files.tsv").exists() || path.join("layer.tar.gz").exists() || path.join("layer.tar").exists()
        })
        .collect();
    directories.sort();
    assert!(!directories.is_empty());
    directories.iter().map(|path| case(path)).collect()
}

fn case(directory: &Path) -> Case {
    let readme = std::fs::read_to_string(directory.join("README.md")).unwrap();
    let (layer, compression) = match std::fs::read(directory.join("layer.tar.gz")) {
        Ok(layer) => (layer, Compression::Gzip),
        Err(_) => (std::fs::read(directory.join("layer.tar")).unwrap(), Compression::None),
    };
    let mut ztocs = BTreeMap::new();
    for file in std::fs::read_dir(directory).unwrap() {
        let path = file.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if let Some(span) = name.strip_prefix("ztoc-").and_then(|name| name.strip_suffix(".ztoc")) {
            // One was made in another time zone, to show that the bytes then differ.
            if let Ok(span) = span.parse() {
                ztocs.insert(span, std::fs::read(&path).unwrap());
            }
        }
    }
    let accepts = readme.contains("Snapshotter: accepts the zTOC");
    let some_fail = readme.contains("regular files read right; not so");
    let tar_sha256 =
        readme.lines().find(|line| line.starts_with("| tar stream")).and_then(|line| line.split("sha256 ").nth(1));
    let files = std::fs::read_to_string(directory.join("files.tsv")).unwrap_or_default();
    Case {
        name: directory.file_name().unwrap().to_str().unwrap().to_owned(),
        aws_reads_it: accepts && !some_fail,
        tar_sha256: tar_sha256.map(|text| text.trim_end_matches([' ', '|']).to_owned()),
        files: files.lines().skip(1).map(file).collect(),
        layer,
        compression,
        ztocs,
    }
}

fn file(line: &str) -> File {
    let fields: Vec<&str> = line.split('\t').collect();
    File { path: fields[0].to_owned(), kind: fields[1].to_owned(), sha256: fields[8].to_owned() }
}

/// Names of the hostile zTOCs, with the name of the layer that each is for.
pub fn hostile(directory: &Path) -> Vec<(String, String)> {
    let readme = std::fs::read_to_string(directory.join("README.md")).unwrap();
    let row = |line: &str| {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        (cells.len() > 5 && cells[1].ends_with(".ztoc")).then(|| (cells[1].to_owned(), cells[4].to_owned()))
    };
    readme.lines().filter_map(row).collect()
}

/// One file "a" with the content "hello".
pub fn tiny_tar() -> Vec<u8> {
    let mut header = [0u8; 512];
    header[0] = b'a';
    let fields: [(usize, &[u8]); 11] = [
        (100, b"0000644\0"),
        (108, b"0000000\0"),
        (116, b"0000000\0"),
        (124, b"00000000005\0"),
        (136, b"00000000000\0"),
        (156, b"0"),
        (257, b"ustar\x0000"),
        (265, b"root"),
        (297, b"root"),
        (329, b"0000000\0"),
        (337, b"0000000\0"),
    ];
    for (at, text) in fields {
        header[at..at + text.len()].copy_from_slice(text);
    }
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum::<u32>() + 8 * 32;
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut tar = header.to_vec();
    tar.extend_from_slice(b"hello");
    tar.resize(2048, 0);
    tar
}

/// gzip of `data` in stored blocks of the given lengths.
pub fn stored_gzip(data: &[u8], lengths: &[usize]) -> Vec<u8> {
    let mut gzip = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff];
    let mut at = 0;
    for (index, length) in lengths.iter().enumerate() {
        gzip.push(u8::from(index + 1 == lengths.len()));
        gzip.extend((*length as u16).to_le_bytes());
        gzip.extend((!*length as u16).to_le_bytes());
        gzip.extend(&data[at..at + length]);
        at += length;
    }
    let mut crc = flate2::Crc::new();
    crc.update(data);
    gzip.extend(crc.sum().to_le_bytes());
    gzip.extend((data.len() as u32).to_le_bytes());
    gzip
}
