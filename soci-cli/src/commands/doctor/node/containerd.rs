//! Checks containerd's configuration of the snapshotter, and finds the lines that are missing in it.

use std::path::Path;

use toml::{Table, Value};

use crate::commands::finding::{Finding, bad, good, note};

/// The snapshotter as a plugin, with annotations from the transfer service.
const PLUGIN: &str = "\
[proxy_plugins.soci]
  type = \"snapshot\"
  address = \"/run/soci-snapshotter-grpc/soci-snapshotter-grpc.sock\"
  [proxy_plugins.soci.exports]
    root = \"/var/lib/soci-snapshotter-grpc\"
    enable_remote_snapshot_annotations = \"true\"";
/// Annotations in configurations of version 3.
const EXPORTS: &str = "\
[proxy_plugins.soci.exports]
  enable_remote_snapshot_annotations = \"true\"";
/// Annotations in configurations of version 2.
const CRI: &str = "\
[plugins.\"io.containerd.grpc.v1.cri\".containerd]
  disable_snapshot_annotations = false";
/// Where the transfer service unpacks: containerd's own list is replaced by what a file has.
const UNPACK: &str = "\
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = \"linux\"
  snapshotter = \"soci\"
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = \"linux\"
  snapshotter = \"overlayfs\"";

/// Judges the file.
pub(super) fn findings(file: &Path) -> Vec<Finding> {
    let shown = file.display();
    let text = match std::fs::read_to_string(file) {
        Ok(text) => text,
        Err(error) => {
            let fix = "without it containerd knows no snapshotter of ours; `soci mount` does not need it";
            return vec![note("containerd", format!("{shown}: {error}"), fix)];
        }
    };
    match text.parse::<Table>() {
        Ok(table) => judge(&table, &shown.to_string()),
        Err(error) => vec![bad("containerd", format!("{shown}: {}", error.message()), "fix the file")],
    }
}

/// Whether the file names the snapshotter.
pub(super) fn has_plugin(file: &Path) -> bool {
    let table = std::fs::read_to_string(file).ok().and_then(|text| text.parse::<Table>().ok());
    table.is_some_and(|table| plugin(&table).is_some())
}

fn plugin(table: &Table) -> Option<&Value> {
    table.get("proxy_plugins")?.get("soci")
}

fn judge(table: &Table, shown: &str) -> Vec<Finding> {
    let plugin = plugin(table);
    let address = plugin.and_then(|plugin| plugin.get("address")).and_then(Value::as_str);
    let mut findings = vec![match address {
        Some(address) if Path::new(address).exists() => good("plugin", format!("soci at {address}")),
        Some(address) => bad("plugin", format!("{address} does not exist"), "start soci-snapshotter-grpc"),
        None => bad("plugin", format!("{shown} has no [proxy_plugins.soci]"), "add").with_lines(PLUGIN),
    }];
    findings.push(annotations(table, plugin));
    findings.extend(unpacking(table));
    findings
}

fn section<'t>(table: &'t Table, name: &str) -> Option<&'t Value> {
    table.get("plugins")?.get(name)
}

/// Whether the snapshotter learns which image a layer belongs to.
fn annotations(table: &Table, plugin: Option<&Value>) -> Finding {
    let old = section(table, "io.containerd.grpc.v1.cri").and_then(|cri| cri.get("containerd"));
    let images = section(table, "io.containerd.cri.v1.images").or(old);
    let annotations = images.and_then(|images| images.get("disable_snapshot_annotations"));
    let exported = plugin
        .and_then(|plugin| plugin.get("exports"))
        .and_then(|exports| exports.get("enable_remote_snapshot_annotations"));
    match (annotations.and_then(Value::as_bool), exported.and_then(Value::as_str)) {
        (Some(false), _) => good("annotations", "CRI passes them to snapshotters"),
        (_, Some("true")) => good("annotations", "the transfer service passes them to snapshotters"),
        _ => {
            let lines = if table.get("version").and_then(Value::as_integer) == Some(3) { EXPORTS } else { CRI };
            let fix = "set disable_snapshot_annotations = false in CRI's section (before 2.1), or \
                       enable_remote_snapshot_annotations = \"true\" in [proxy_plugins.soci.exports]; here:";
            bad("annotations", "images pulled by CRI come without them, and are pulled whole", fix).with_lines(lines)
        }
    }
}

/// Whether the transfer service can unpack for both snapshotters: a list in the file replaces containerd's own, which
/// has overlayfs only.
fn unpacking(table: &Table) -> Option<Finding> {
    let listed = section(table, "io.containerd.transfer.v1.local")?.get("unpack_config")?.as_array()?;
    let has = |name: &str| listed.iter().any(|one| one.get("snapshotter").and_then(Value::as_str) == Some(name));
    let missing: Vec<&str> = ["soci", "overlayfs"].into_iter().filter(|name| !has(name)).collect();
    if missing.is_empty() {
        return Some(good("unpacking", "the transfer service unpacks for soci and overlayfs"));
    }
    let found = format!(
        "unpack_config of the transfer service lacks {}: such pulls end with \"no unpack platforms defined\"",
        missing.join(" and ")
    );
    Some(bad("unpacking", found, "list both:").with_lines(UNPACK))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::doctor::Verdict;

    const ANNOTATED: &str = "[proxy_plugins.soci]\ntype = 'snapshot'\naddress = '/dev/null'\n\
                             [proxy_plugins.soci.exports]\nenable_remote_snapshot_annotations = 'true'\n";

    fn verdicts(text: &str) -> Vec<Verdict> {
        judge(&text.parse().unwrap(), "config.toml").iter().map(|finding| finding.verdict).collect()
    }

    #[test]
    fn what_containerd_is_configured_for() {
        let plugin = "[proxy_plugins.soci]\ntype = 'snapshot'\naddress = '/dev/null'\n";
        let old = "[plugins.\"io.containerd.grpc.v1.cri\".containerd]\ndisable_snapshot_annotations = false\n";
        let new = "[plugins.'io.containerd.cri.v1.images']\ndisable_snapshot_annotations = false\n";
        let exports = "[proxy_plugins.soci.exports]\nenable_remote_snapshot_annotations = 'true'\n";
        for good in [old, new, exports] {
            assert_eq!(verdicts(&format!("{plugin}{good}")), [Verdict::Good, Verdict::Good], "{good}");
        }
        assert_eq!(verdicts(plugin), [Verdict::Good, Verdict::Bad]);
        assert_eq!(verdicts(""), [Verdict::Bad, Verdict::Bad]);
        assert_eq!(verdicts(&plugin.replace("null", "no-such")), [Verdict::Bad, Verdict::Bad]);
    }

    #[test]
    fn both_snapshotters_are_unpacked_for() {
        let entry = |name: &str| {
            format!("[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\nsnapshotter = '{name}'\n")
        };
        let with = |names: &[&str]| {
            let entries: String = names.iter().map(|name| entry(name)).collect();
            verdicts(&format!("{ANNOTATED}{entries}")).split_off(2)
        };
        assert_eq!(with(&[]), [], "containerd's own list is none of ours");
        assert_eq!(with(&["soci", "overlayfs"]), [Verdict::Good]);
        for lacking in [&["soci"][..], &["overlayfs"], &["stargz"]] {
            assert_eq!(with(lacking), [Verdict::Bad], "{lacking:?}");
        }
    }

    /// The printed snippet fixes the problem that it is printed for.
    #[test]
    fn lines_to_paste_mend() {
        let there = |lines: &str| lines.replace("/run/soci-snapshotter-grpc/soci-snapshotter-grpc.sock", "/dev/null");
        assert_eq!(verdicts(&format!("version = 3\n{}\n{UNPACK}", there(PLUGIN))), [Verdict::Good; 3]);
        let plugin = "[proxy_plugins.soci]\naddress = '/dev/null'\n";
        for (version, lines) in [(3, EXPORTS), (2, CRI)] {
            let text = format!("version = {version}\n{plugin}");
            let findings = judge(&text.parse().unwrap(), "config.toml");
            assert_eq!(findings[1].paste, Some(lines));
            assert_eq!(verdicts(&format!("{text}{lines}")), [Verdict::Good; 2], "{version}");
        }
    }
}
