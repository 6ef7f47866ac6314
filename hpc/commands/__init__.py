"""The commands of `hpc`, by the panel of its help that they stand in; each is thin."""
