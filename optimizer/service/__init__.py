"""The optimizer as a service: durable jobs, workers that hold leases on them, REST, gRPC.

A job is one run of `optimizer.study` for a spec that came over the wire. `jobs` says what may
happen to it, `ledger` keeps it in a database, `operations` is what all ways in call, `worker` runs
it in a child process.
"""
