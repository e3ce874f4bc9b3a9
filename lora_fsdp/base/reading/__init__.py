"""Weights on their way from files: into the page cache ahead of time, and by several threads."""
