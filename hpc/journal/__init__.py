"""The journal: what was tried, what came of it, and how it compares, from the files of the runs alone."""
