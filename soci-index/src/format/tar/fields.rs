//! A header and the extended headers before it, merged into the fields of one entry.

use std::borrow::Cow;

use crate::format::entry::Timestamp;
use crate::format::tar::header::Header;
use crate::format::tar::{Ahead, TarError, pax};

/// Header and extended headers, merged.
pub(super) struct Fields<'a> {
    pub(super) header_offset: u64,
    pub(super) name: Vec<u8>,
    pub(super) link: Vec<u8>,
    pub(super) user_name: Cow<'a, [u8]>,
    pub(super) group_name: Cow<'a, [u8]>,
    pub(super) size: i64,
    pub(super) mode: i64,
    pub(super) uid: i64,
    pub(super) gid: i64,
    pub(super) modified: Timestamp,
    pub(super) device: (i64, i64),
    pub(super) pax: pax::Records,
}

impl<'a> Fields<'a> {
    /// PAX records override the header unless empty; GNU long names override both.
    pub(super) fn merge(header: &Header<'a>, ahead: Ahead, offset: u64) -> Result<Self, TarError> {
        let Ahead { offset: first, pax: records, long_name, long_link } = ahead;
        let text = |key: &[u8]| pax::find(&records, key).map(<[u8]>::to_vec);
        let integer = |key: &[u8], value: i64| match pax::find(&records, key) {
            Some(text) => pax::integer(text).ok_or(TarError::Extended { offset }),
            None => Ok(value),
        };
        let time = |key: &[u8], value: (i64, u32)| match pax::find(&records, key) {
            Some(text) => pax::time(text).ok_or(TarError::Extended { offset }),
            None => Ok(value),
        };
        // Unused, but malformed ones make the archive invalid for Go's reader.
        time(b"atime", (0, 0))?;
        time(b"ctime", (0, 0))?;
        let (seconds, nanoseconds) = time(b"mtime", (header.seconds, 0))?;
        let long = |long: Vec<u8>, short: Vec<u8>| if long.is_empty() { short } else { long };
        Ok(Self {
            header_offset: first.unwrap_or(offset),
            name: long(long_name, text(b"path").unwrap_or_else(|| header.name.clone())),
            link: long(long_link, text(b"linkpath").unwrap_or_else(|| header.link.to_vec())),
            user_name: text(b"uname").map_or(header.user_name.into(), Into::into),
            group_name: text(b"gname").map_or(header.group_name.into(), Into::into),
            size: integer(b"size", header.size)?,
            mode: header.mode,
            uid: integer(b"uid", header.uid)?,
            gid: integer(b"gid", header.gid)?,
            modified: Timestamp { seconds, nanoseconds },
            device: (header.device_major, header.device_minor),
            pax: records,
        })
    }
}
