//! Exit codes of what goes wrong with containerd.

use soci_fs::node::grpc::containerd::ContainerdError;
use soci_fs::node::rpull::PullError;

use crate::report::exit::{Exit, of_image};

pub(super) fn known(error: &(dyn std::error::Error + 'static)) -> Option<Exit> {
    if let Some(error) = error.downcast_ref::<PullError>() {
        return Some(of_pull(error));
    }
    error.downcast_ref::<ContainerdError>().map(of_containerd)
}

fn of_pull(error: &PullError) -> Exit {
    match error {
        PullError::Image(error) => of_image(error),
        PullError::Containerd(error) => of_containerd(error),
        PullError::NoSnapshotter { .. } => Exit::Local,
        PullError::Layers { .. } | PullError::WrongTar { .. } | PullError::Foreign { .. } => Exit::BadContent,
    }
}

fn of_containerd(error: &ContainerdError) -> Exit {
    match error {
        ContainerdError::Unreachable { .. } | ContainerdError::Refused { .. } | ContainerdError::Answer { .. } => {
            Exit::Local
        }
        ContainerdError::Name { .. } | ContainerdError::NoContainer { .. } => Exit::Usage,
        ContainerdError::NoImage { .. } => Exit::Failure,
        ContainerdError::Content(_) => Exit::Registry,
    }
}
