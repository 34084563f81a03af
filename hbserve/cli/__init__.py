"""The command ``hbserve``: `main` finds the subcommand, and each has a module that is imported only when it runs."""
