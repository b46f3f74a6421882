"""The operations of the program, one module per operation: `plan`, `sync`, `audit`, ...

Belongs here: the sequence of steps (plan, fetch, verify, commit), the fallback to the next provider, progress
events. Does not belong here: SQL, HTTP, Dagster, the terminal.
"""
