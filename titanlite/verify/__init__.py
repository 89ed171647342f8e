"""`titanlite verify`: a layout against one process, on a small model of the same structure.

`shrink` makes the small recipe, `compare` runs it twice, `command` says what came of it.
"""
