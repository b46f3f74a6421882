"""The providers of candles: one file each, and their shared code.

Belongs here: capabilities, requests, the parsing of responses and errors.
Does not belong here: the order of the providers, what is missing, where candles are stored.
"""
