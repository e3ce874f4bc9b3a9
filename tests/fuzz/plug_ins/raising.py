"""A plug-in whose import raises."""

raise RuntimeError("this plug-in is broken")
