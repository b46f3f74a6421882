"""What the program does, one module a verb: `plan` what is missing, `sync` it.

Belongs here: the order of things (plan, fetch, verify, commit), who is asked next, what is told
while it happens. Does not belong here: SQL, HTTP, Dagster, the terminal.
"""
