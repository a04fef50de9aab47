"""The papers' experiments with the library's public functions: each module is a command for one page."""
