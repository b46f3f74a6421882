"""From the spans of a plan to verified candles, from as many providers as needed.

    spans      the spans of a plan, a few ahead, compared with their neighbours
    fallback   one span: the providers of the `chain` in order, each for the candles still missing
    request    one range from one provider, `native` or `derived` from finer candles
    splice, second_opinion, refetch   whether an answer fits the stored candles and those of other providers

Belongs here: what is requested, and which candles of the answers are accepted. Does not belong here: the plan, the
listing times, writing.
"""
