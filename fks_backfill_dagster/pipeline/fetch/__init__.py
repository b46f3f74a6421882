"""From the spans of a plan to verified candles, from as many providers as it takes.

    spans      the spans of a plan, a few ahead, compared with their neighbours
    fallback   one span: the providers of the `chain` in order, each for the candles still missing
    request    one range from one provider, `native` or `derived` from finer candles
    splice, second_opinion, refetch   whether an answer fits what is stored and what others say

Belongs here: what is requested, and what of the answers is believed. Does not belong here: the plan, the listing times,
writing.
"""
