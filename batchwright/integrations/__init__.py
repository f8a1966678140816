"""Adapters to other projects: one file each, the only place that imports that project."""
