"""Candles, ranges, series and grids: pure functions and frozen values.

Belongs here: timeframes, half-open ranges, the expected grid of every asset class, the candle
block, the validation rules of a candle.

Does not belong here: anything that reads a clock, a file, a socket or a database. Time is passed in.

Instants are `int`: microseconds since the Unix epoch, UTC. Arrays of them are `int64`. There is one unit
everywhere and no time zone, and `array.view("datetime64[us]")` costs nothing.
"""
