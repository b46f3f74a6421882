"""The demo: the whole program on a local market, and the scenario that it plays."""
