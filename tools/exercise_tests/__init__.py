"""The tests that `python -m tools.exercises` puts beside the empty functions. They run there, not here."""
