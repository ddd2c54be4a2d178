"""The service's page: HTML made on the server, a few small scripts, nothing from elsewhere.

`routes` has the addresses, `job_view` gathers what a page shows, `findings`, `plot`, `lineage` and
`comparison` turn a study's variants into rows and marks. It changes nothing but through
`optimizer.service.operations`.
"""
