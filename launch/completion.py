"""Completion of verbs, experiments, groups and settings for the command `powertrain`, in bash and zsh.

usage: powertrain completion bash|zsh

examples:
  source <(powertrain completion bash)        # in ~/.bashrc
  source <(powertrain completion zsh)         # in ~/.zshrc
"""

from __future__ import annotations

import argparse
import sys

from powertrain.launch.__main__ import VERBS
from powertrain.launch.parser import verb_parser
from powertrain.train.cli import guard
from powertrain.train.compose import group_names, options
from powertrain.train.config import setting_names

# Only the word up to the cursor counts. bash breaks it at every = and replaces what follows the last one.
_SCRIPT = """
_powertrain() {{
    local line=${{COMP_LINE:0:$COMP_POINT}} word choices
    word=${{line##*[[:space:]]}}
    if [[ $COMP_CWORD -eq 1 ]]; then choices="{verbs}"; else choices="{settings}"; fi
    COMPREPLY=($(compgen -W "$choices" -- "$word"))
    if [[ ${{COMPREPLY[0]}} == *= ]]; then {no_space}; fi
    if [[ $word == *=* && $COMP_WORDBREAKS == *=* ]]; then COMPREPLY=("${{COMPREPLY[@]#"${{word%=*}}"=}}"); fi
}}
complete -o default -F _powertrain powertrain
"""


def main(arguments: list[str] | None = None) -> None:
    """Print the script for the shell to source."""
    parser = verb_parser("completion", __doc__)
    parser.add_argument("shell", choices=("bash", "zsh"), help=argparse.SUPPRESS)
    sys.exit(guard(lambda: _completion(parser.parse_args(arguments).shell == "zsh")))


def _completion(zsh: bool) -> int:
    groups = [
        f"{'+' * (name in ('experiment', 'sweep'))}{name}={option}"
        for name in group_names()
        for option in options(name)
    ]
    names = setting_names()
    leaves = [name for name in names if name not in group_names() and not any(n.startswith(f"{name}.") for n in names)]
    settings = " ".join([*groups, *(f"{name}=" for name in leaves), "--help", "--config-dir"])
    print("autoload -U +X bashcompinit && bashcompinit" if zsh else "", end="")
    print(_SCRIPT.format(verbs=" ".join(VERBS), settings=settings, no_space=":" if zsh else "compopt -o nospace"))
    return 0


if __name__ == "__main__":
    main()
