"""The `orchestrator` command. Most commands only read journals and records, and need no JAX.

`adopt`, `diff`, `export` and `verify` need JAX, and import it only when they run. Of all commands `adopt`, `gc`, `pin`,
`unpin`, `quarantine`, `release`, `recover` and `verify` may write to the run.
"""
