"""The one package that writes candles (a test holds that), and with them all that must change together.

commit     one batch            undo      its reversal
closures   other closed dates   repair    ledger, coverage and totals from the candles
remove     a whole series
"""
