"""One module per subcommand: its flags and a handler that imports lazily."""
