"""The demo and its scenario."""
