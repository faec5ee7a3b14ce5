"""Shell completion, written out of the table of commands: `source <(orchestrator completion bash)`. Pure text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orchestrator.cli.usage import choose_from
from orchestrator.errors import UsageError

SHELLS = ("bash", "zsh", "fish")
_BASH = """\
_orchestrator() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} command=${{COMP_WORDS[1]}} flags=
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{commands}" -- "$word"))
    return
  fi
  case $command in
{cases}
  esac
  if [[ $word == -* ]]; then
    COMPREPLY=($(compgen -W "$flags" -- "$word"))
  else
    COMPREPLY=($(compgen -f -- "$word"))
  fi
}}
complete -o filenames -o bashdefault -F _orchestrator orchestrator
"""
_ZSH = """\
#compdef orchestrator
autoload -U +X bashcompinit && bashcompinit
"""
_FISH = "complete -c orchestrator -n __fish_use_subcommand -f -a {name} -d {about}"
_FISH_FLAG = "complete -c orchestrator -n '__fish_seen_subcommand_from {name}' -l {flag} -d {about}"


def script(shell: str, flags: Mapping[str, Sequence[tuple[str, str]]], about: Mapping[str, str]) -> str:
    """`flags`: each command's (name, description); `about`: each command's one line. Raises UsageError."""
    if shell == "fish":
        lines = []
        for name, options in flags.items():
            lines.append(_FISH.format(name=name, about=_quoted(about[name])))
            lines += [_FISH_FLAG.format(name=name, flag=flag, about=_quoted(text)) for flag, text in options]
        return "\n".join(lines) + "\n"
    cases = "\n".join(
        f'    {name}) flags="{" ".join(f"--{flag}" for flag, _ in options)}" ;;' for name, options in flags.items()
    )
    bash = _BASH.format(commands=" ".join(flags), cases=cases)
    scripts = {"bash": bash, "zsh": _ZSH + bash}
    if shell not in scripts:
        raise UsageError(f"no completion for {shell!r}; {choose_from(shell, SHELLS)}")
    return scripts[shell]


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
