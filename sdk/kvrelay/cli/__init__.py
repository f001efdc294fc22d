"""The `kvrelay` command.

`main` dispatches, `commands/` holds one module per subcommand (its flags and a lazy handler), `flags`
says what a flag is, `settings` resolves argument, environment and default into values.
"""
