"""What the library costs beside others; see README.md for the commands."""
