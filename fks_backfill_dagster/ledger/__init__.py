"""The ledgers. Of gaps: which expected candles are absent, why, and when they are requested again. Of findings: which
stored candles are suspicious, since when, and who accepted it.

Pure rules and records: no I/O, no clock; time is passed in. `store` stores the rows, `pipeline` collects the
evidence.

    records    Evidence, LedgerGap, Known
    gaps       the arithmetic: missing opens grouped into gaps
    no_trade   the rule for no-trade intervals
    settle     the change of the ledger after a window was requested
    reconcile  the recorded ledger against the ledger that follows from the candles (the audit)
    days       the missing candles of a gap by day; reconcile_days: the same for the audit
    findings   the records of findings, and how they change
    detections  flagged candles grouped into runs
"""
