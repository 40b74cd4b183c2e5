"""The commands, one module each; `main` only reads the command line."""
