"""HTTP for every provider: limits, waits, retries, and errors that name what happened.

client   one exchange            pool    requests in flight     limiter   permits
retry    when it is repeated     errors  what a response means  body      its bytes, bounded
"""
