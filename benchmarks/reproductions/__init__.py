"""Published results repeated by simulation: one script per paper; docs/reproductions.md."""
