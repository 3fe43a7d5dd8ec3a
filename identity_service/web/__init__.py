"""All the HTTP: one file per resource, and what they share.

`middleware` is the outer edge of every request, `problems` and `oauth` render refusals, `strict_json` and `oauth` read
bodies, `dependencies` says who may call a route. Rules live in the domain packages; a route parses, makes one call, and
renders.
"""

import sys

# FastAPI imports pydantic's old self to refuse models made with it, for a tenth of the start. We have none.
sys.modules.setdefault("pydantic.v1", None)  # type: ignore[arg-type]  # how Python says that there is no such module
