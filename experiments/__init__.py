"""The experiments that ship with the package; see README.md for what each shows."""
