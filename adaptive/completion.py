"""A shell's completion of commands, options and recipes, from what each command's --help shows."""

import re
from collections.abc import Mapping
from string import Template

from adaptive.errors import UserError
from adaptive.recipe import list_recipes

SCRIPT = Template("""\
_adaptive() {
    local words
    case "$${COMP_WORDS[COMP_CWORD-1]}" in
        --recipe|--against) words="$recipes" ;;
        *) case "$$COMP_CWORD $${COMP_WORDS[1]}" in
            1\\ *) words="$commands" ;;
$cases
        esac ;;
    esac
    COMPREPLY=($$(compgen -W "$$words" -- "$${COMP_WORDS[COMP_CWORD]}"))
}
complete -o default -F _adaptive adaptive
""")
FIRST = {"bash": "", "zsh": "autoload -U +X bashcompinit && bashcompinit\n"}


def script(shell: str, helps: Mapping[str, str]) -> str:
    """What the shell reads; helps: the --help of each command. Where no word fits, names of files do.

    Raises UserError for a shell that is not known.
    """
    if shell not in FIRST:
        raise UserError(f"--completion {shell}: there is one for {' and '.join(FIRST)}")
    cases = [f'            *\\ {name}) words="{" ".join(words_of(name, text))}" ;;' for name, text in helps.items()]
    names = {"recipes": " ".join(list_recipes()), "commands": " ".join(helps), "cases": "\n".join(cases)}
    return FIRST[shell] + SCRIPT.substitute(names)


def words_of(name: str, text: str) -> list[str]:
    """Subcommands and options that the --help of a command shows."""
    inner = re.findall(r"^  \{([\w,-]+)\}", text, re.MULTILINE)
    inner = inner[0].split(",") if inner else re.findall(rf"adaptive {name} ([a-z][\w-]+)", text)
    usage = text.partition("\n\n")[0] if text.startswith("usage: ") else text
    return [*inner, *sorted({"--help", *re.findall(r"(?<![\w-])--[a-z]\w*", usage)})]
