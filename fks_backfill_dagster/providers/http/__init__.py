"""HTTP for all providers: limits, waits, retries and errors.

client   one exchange            pool    requests in flight     limiter   permits
retry    budget and back-off     errors  status and failures    body      bounded reading
"""
