"""The gap ledger: which expected candles are absent, why, and when they are requested again.

Pure rules and records: no I/O, no clock; time is passed in. `store` keeps the rows, `pipeline` obtains the
evidence.

    records    Evidence, LedgerGap, Known
    gaps       the arithmetic: missing opens grouped into gaps
    settle     how the ledger changes when a window was requested
    reconcile  the ledger as recorded against the ledger as the candles say it should be (the audit)
"""
