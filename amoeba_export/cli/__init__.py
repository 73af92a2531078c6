"""The command line. `app.main` is the whole of it; each command has a file of its own."""
