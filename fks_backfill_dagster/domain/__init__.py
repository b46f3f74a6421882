"""What a candle, a range, a series and a gap *are*: pure functions and frozen values.

Belongs here: timeframes, half-open ranges, the expected grid of every asset class, the candle
block, the rules a candle must obey, the arithmetic of gaps.

Does not belong here: anything that reads a clock, a file, a socket or a database. Time is passed in.

Instants are `int`: microseconds since the Unix epoch, UTC. Arrays of them are `int64`. One unit
everywhere, no zone to forget, and `array.view("datetime64[us]")` costs nothing.
"""
