//! What the programs say of themselves.

/// The names of the arguments and commands without a help text.
pub fn missing(command: &clap::Command) -> Vec<String> {
    let of = |name: String| format!("{} {name}", command.get_name());
    let arguments = command.get_arguments();
    let without = arguments.filter(|argument| argument.get_help().is_none());
    let mut names: Vec<_> = without
        .map(|argument| of(argument.get_id().to_string()))
        .collect();
    if command.get_about().is_none() {
        names.push(of(String::new()));
    }
    names.extend(command.get_subcommands().flat_map(missing));
    names
}
