"""The demo: the complete program on a local market, and a scenario with a failed month."""
