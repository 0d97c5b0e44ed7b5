//! The part on options of docs/configuration.md, made from the definition of the command line.

use clap::{Arg, Command, CommandFactory};

use crate::args::Arguments;

/// The options of all commands as Markdown: the part on commands of docs/configuration.md.
#[must_use]
pub fn markdown() -> String {
    let soci = Arguments::command();
    let daemon = crate::daemon::args::Arguments::command();
    let (mut commands, mut shared) = (Vec::new(), Shared::default());
    leaves(&soci, "soci", &mut commands);
    shared.collect(&soci);
    for (_, command) in &commands {
        shared.collect(command);
    }
    let mut page = String::new();
    for (name, command) in &commands {
        page += &section(name, command, &shared);
    }
    for (heading, options) in &shared.groups {
        page += &format!("### {heading}\n\n{}", table(options.iter()));
    }
    page + &section("soci-snapshotter-grpc", &daemon, &Shared::default())
}

/// The commands that do something, with their whole names.
fn leaves(command: &Command, name: &str, found: &mut Vec<(String, Command)>) {
    for command in command.get_subcommands().filter(|command| !command.is_hide_set()) {
        let name = format!("{name} {}", command.get_name());
        if command.has_subcommands() {
            leaves(command, &name, found);
        } else {
            found.push((name, command.clone()));
        }
    }
}

/// Options that several commands have, by the heading that `--help` puts them under. In a structure of arguments what is
/// flattened stands last: clap would give its heading to all that follows.
#[derive(Default)]
struct Shared {
    groups: Vec<(String, Vec<Arg>)>,
}

impl Shared {
    fn collect(&mut self, command: &Command) {
        for option in options(command) {
            let Some(heading) = option.get_help_heading() else { continue };
            let at = self.groups.iter().position(|(known, _)| known == heading).unwrap_or_else(|| {
                self.groups.push((heading.to_owned(), Vec::new()));
                self.groups.len() - 1
            });
            let known = &mut self.groups[at].1;
            if !known.iter().any(|known| known.get_id() == option.get_id()) {
                known.push(option.clone());
            }
        }
    }

    /// Which groups a command has, and which of their options it has not.
    fn line(&self, command: &Command) -> String {
        let own: Vec<&Arg> = options(command).collect();
        let mut links = Vec::new();
        for (heading, known) in &self.groups {
            let is_own = |option: &&Arg| {
                own.iter().any(|own| own.get_id() == option.get_id() && own.get_help_heading() == Some(heading))
            };
            let lacking: Vec<String> = known.iter().filter(|option| !is_own(option)).map(long).collect();
            if lacking.len() == known.len() {
                continue;
            }
            let but = if lacking.is_empty() { String::new() } else { format!(" (without {})", lacking.join(", ")) };
            links.push(format!("[{heading}](#{}){but}", heading.to_lowercase()));
        }
        if links.is_empty() { String::new() } else { format!("Also the options of {}.\n\n", links.join(", ")) }
    }
}

fn options(command: &Command) -> impl Iterator<Item = &Arg> {
    command.get_arguments().filter(|option| !option.is_hide_set())
}

fn long(option: &Arg) -> String {
    format!("`--{}`", option.get_long().unwrap_or_default())
}

fn section(name: &str, command: &Command, shared: &Shared) -> String {
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    let usage = command.clone().bin_name(name).render_usage().to_string();
    let usage = usage.trim_start_matches("Usage: ").trim();
    let own = options(command).filter(|option| shared.groups.is_empty() || option.get_help_heading().is_none());
    format!("### {name}\n\n{about}.\n\n```text\n{usage}\n```\n\n{}{}", table(own), shared.line(command))
}

fn table<'a>(options: impl Iterator<Item = &'a Arg>) -> String {
    let rows: String = options.map(row).collect();
    if rows.is_empty() { String::new() } else { format!("| option | meaning |\n|---|---|\n{rows}\n") }
}

fn row(option: &Arg) -> String {
    let values =
        option.get_value_names().unwrap_or_default().iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    let name = match (option.get_long(), option.get_short()) {
        (None, _) => format!("<{values}>"),
        (Some(long), short) => {
            let short = short.map(|short| format!("-{short}, ")).unwrap_or_default();
            let values = if option.get_action().takes_values() { format!(" {values}") } else { String::new() };
            format!("{short}--{long}{values}")
        }
    };
    let mut says = option.get_help().map(ToString::to_string).unwrap_or_default().replace('\n', " ");
    let choices = option.get_possible_values();
    if option.get_action().takes_values() && !choices.is_empty() {
        let said = choices.iter().map(|choice| match choice.get_help() {
            Some(help) => format!("`{}`: {}", choice.get_name(), help.to_string().trim_end_matches('.')),
            None => format!("`{}`", choice.get_name()),
        });
        says += &format!(" ({})", said.collect::<Vec<_>>().join("; "));
    }
    let defaults: Vec<_> = option.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
    if option.get_action().takes_values() && !defaults.is_empty() {
        says += &format!(" [default: {}]", defaults.join(", "));
    }
    if let Some(variable) = option.get_env() {
        says += &format!(" [variable: `{}`]", variable.to_string_lossy());
    }
    format!("| `{}` | {} |\n", name.replace('|', "\\|"), says.replace('|', "\\|"))
}
