"""Hosting Dagster on one machine: its servers and their keeper, its storage, its queue, and the client of its GraphQL.

Belongs here: whatever starts, stops, guards or talks to a Dagster process. Does not belong here: definitions
(`orchestration`), which this package names and never imports.
"""
