"""Files that bring candles: CSV and Parquet.

Belongs here: formats, and the place of each problem in a file. Does not belong here: whether candles are valid
(domain), writing them (store).
"""
