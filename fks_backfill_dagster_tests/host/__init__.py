"""Dagster's processes on this machine: real servers, killed, restarted and attacked."""
