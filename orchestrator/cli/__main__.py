"""`python -m orchestrator.cli`: the same as the `orchestrator` command."""

from orchestrator.cli.main import entry

if __name__ == "__main__":
    entry()
