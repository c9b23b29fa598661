//! Completion scripts. Owns that bash also offers the ids of tasks where a command takes them. Never: the flags, which
//! clap knows.

use clap_complete::Shell;

use crate::args;

/// Asks the broker that the environment names. Without an answer within a moment there is nothing to offer.
const BASH_TASKS: &str = r#"
_mesh-client-with-tasks() {
    local at word
    for ((at = 1; at < COMP_CWORD; at++)); do
        case "${COMP_WORDS[at]}" in
            status|result|wait|cancel|why)
                if [[ "${COMP_WORDS[COMP_CWORD]}" != -* && "${COMP_WORDS[COMP_CWORD - 1]}" != -* ]]; then
                    word=$("$1" tasks --quiet --timeout 2s 2>/dev/null | sed -n '2,$s/ .*//p')
                    COMPREPLY=($(compgen -W "$word" -- "${COMP_WORDS[COMP_CWORD]}"))
                    return 0
                fi
                ;;
        esac
    done
    _mesh-client "$@"
}

complete -F _mesh-client-with-tasks -o bashdefault -o default mesh-client
"#;

/// The script for this shell.
pub(crate) fn script(shell: Shell) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut args::command(), "mesh-client", &mut script);
    if shell == Shell::Bash {
        script.extend(BASH_TASKS.as_bytes());
    }
    script
}
