"""Foreign volumes and images into volume files: see packer.pack. Imports no torch."""
