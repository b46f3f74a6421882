"""Dagster on one machine: servers and their keeper, storage, run queue, and a GraphQL client.

Belongs here: code that starts, stops, guards or calls a Dagster process. Does not belong here: definitions
(`orchestration`), which this package refers to by name and never imports.
"""
