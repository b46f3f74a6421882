"""The outside world that has candles: one file per provider, and what they share.

Belongs here: what a provider can give, how it is asked, how its answers and errors are read.
Does not belong here: which provider is asked first, what is missing, where candles are stored.
"""
