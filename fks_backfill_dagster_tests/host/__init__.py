"""Dagster's processes on this machine: whole servers, killed, restarted and attacked."""
