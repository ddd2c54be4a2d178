"""REST: the operations as HTTP, with an OpenAPI document at /openapi.json.

`application` puts it together; `jobs`, `uploads`, `overview` and
`health` have the routes, `bodies` what a submission comes as, `parameters` what routes have in
common, `problems` the answers to errors, which are problem documents (RFC 9457).
"""
