"""The only package that writes candles (a test checks that), and everything that must change together with them.

commit     one batch              undo      the reversal of a batch
closures   changed closed dates   repair    ledger, coverage and totals from the candles
actions    corporate actions      remove    a whole series
"""
