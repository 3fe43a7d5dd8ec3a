"""All the HTTP: one file per resource, and what they share.

`middleware` is the outer edge of every request, `problems` and `oauth` render refusals, `strict_json` and `oauth` read
bodies, `dependencies` says who may call a route. Rules live in the domain packages; a route parses, makes one call, and
renders.
"""
