"""The papers' experiments, from the library's public functions: each module is a command, a table and a picture."""
