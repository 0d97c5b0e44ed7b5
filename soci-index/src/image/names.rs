//! How one image among several of a layout or archive is named: by its whole name, by its tag, or by its place.
//!
//! Names are compared spelt out, as skopeo compares them: `db` is `docker.io/library/db:latest`. A tag alone is enough
//! where it is of one image. `@N` means the image at that place of the list, counted from 0, for images without a name.

/// Places, among images with these `names`, of those that `wanted` means. A whole name is preferred to a tag.
pub(crate) fn meant(images: &[Vec<String>], wanted: &str) -> Vec<usize> {
    if let Some(place) = wanted.strip_prefix('@').and_then(|place| place.parse::<usize>().ok()) {
        return (place < images.len()).then_some(place).into_iter().collect();
    }
    let select = |fits: &dyn Fn(&str) -> bool| -> Vec<usize> {
        let places = images.iter().enumerate().filter(|(_, names)| names.iter().any(|name| fits(name)));
        places.map(|(place, _)| place).collect()
    };
    let exact = select(&|name| name == wanted);
    if !exact.is_empty() {
        return exact;
    }
    let whole = spelt_out(wanted);
    let whole = select(&|name| name.contains(['/', ':']) && spelt_out(name) == whole);
    if !whole.is_empty() {
        return whole;
    }
    select(&|name| name.strip_suffix(wanted).is_some_and(|rest| rest.ends_with(':')))
}

/// What can be typed for each image: a name that means it alone, else its place.
pub(crate) fn typed(images: &[Vec<String>]) -> Vec<String> {
    let name = |(place, names): (usize, &Vec<String>)| {
        let own = names.iter().find(|name| meant(images, name) == [place]);
        own.cloned().unwrap_or_else(|| format!("@{place}"))
    };
    images.iter().enumerate().map(name).collect()
}

fn spelt_out(name: &str) -> String {
    let (host, rest) = match name.split_once('/') {
        Some((host, rest)) if host.contains(['.', ':']) || host == "localhost" => (host, rest),
        _ => ("docker.io", name),
    };
    let host = if host == "index.docker.io" { "docker.io" } else { host };
    let library = if host == "docker.io" && !rest.contains('/') { "library/" } else { "" };
    let tag = if rest.rsplit('/').next().is_some_and(|last| last.contains([':', '@'])) { "" } else { ":latest" };
    format!("{host}/{library}{rest}{tag}")
}

/// A text from an archive for a message: one line, without control characters.
pub(crate) fn printable(text: &str, characters_max: usize) -> String {
    let escaped = |character: char| match character {
        character if character.is_control() => character.escape_default().to_string(),
        character => character.to_string(),
    };
    text.chars()
        .filter(|character| *character != char::REPLACEMENT_CHARACTER)
        .take(characters_max)
        .map(escaped)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn images(names: &[&[&str]]) -> Vec<Vec<String>> {
        names.iter().map(|names| names.iter().map(|name| (*name).to_owned()).collect()).collect()
    }

    #[test]
    fn one_of_several() {
        let images = images(&[
            &["team/app:latest"],
            &["team/db:latest", "team/db:2"],
            &["docker.io/library/debian:13"],
            &["localhost:5000/x:3"],
            &[],
        ]);
        for (wanted, expected) in [
            ("team/app:latest", &[0][..]),
            ("team/app", &[0]),
            ("docker.io/team/db", &[1]),
            ("docker.io/team/db:2", &[1]),
            ("2", &[1]),
            ("latest", &[0, 1]),
            ("debian:13", &[2]),
            ("library/debian:13", &[2]),
            ("index.docker.io/library/debian:13", &[2]),
            ("localhost:5000/x:3", &[3]),
            ("3", &[3]),
            ("@4", &[4]),
            ("@5", &[]),
            ("debian", &[]),
            ("db:2", &[]),
            ("", &[]),
        ] {
            assert_eq!(meant(&images, wanted), expected, "{wanted}");
        }
        assert_eq!(
            typed(&images),
            ["team/app:latest", "team/db:latest", "docker.io/library/debian:13", "localhost:5000/x:3", "@4"]
        );
    }

    #[test]
    fn tags_only() {
        let images = images(&[&["v1"], &["v2"], &["v2"]]);
        assert_eq!((meant(&images, "v1"), meant(&images, "v2")), (vec![0], vec![1, 2]));
        assert_eq!(typed(&images), ["v1", "@1", "@2"]);
    }
}
