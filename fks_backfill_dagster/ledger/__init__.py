"""The gap ledger: which expected candles are absent, why, and when they are requested again.

Pure rules and records: no I/O, no clock; time is passed in. `store` stores the rows, `pipeline` collects the
evidence.

    records    Evidence, LedgerGap, Known
    gaps       the arithmetic: missing opens grouped into gaps
    no_trade   the rule for no-trade intervals
    settle     the change of the ledger after a window was requested
    reconcile  the recorded ledger against the ledger that follows from the candles (the audit)
"""
