"""The layouts that are compared with one process, and the runs that compare them."""
