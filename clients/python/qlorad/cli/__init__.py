"""The command line `qlorad`.

Law of this room: speaks to the daemons through the client library alone; what
is imported at the top of a module is needed for `--help`, all else is imported
where it is used.
"""
