"""Routes that the edge calls by itself: the framework's way to a route costs more than what some of them do.

They are declared like any other, so that the API's description, the walk over all routes and its search for guards know
them. What is not exactly their path and method goes the framework's way, and is refused there.
"""

import inspect
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute

from identity_service.errors import IdentityError
from identity_service.web import problems


class DirectRoute(APIRoute):
    """A route whose endpoint takes the request and returns the response; the framework has nothing to add to either.

    An endpoint that is no coroutine has nothing to wait for, and is called `at_once`, before there is even a task.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        self.at_once = not inspect.iscoroutinefunction(endpoint)
        if list(inspect.signature(endpoint).parameters) != ["request"] or self.dependencies or "{" in path:
            raise TypeError(f"{path}: an endpoint that is called directly takes the request and nothing else")

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        return self.respond

    async def respond(self, request: Request) -> Response:
        """Return the answer, whether it is a refusal or not."""
        try:
            response: Response = self.endpoint(request) if self.at_once else await self.endpoint(request)
        except IdentityError as error:
            return problems.refused(request, error)
        return response


def direct_routes(routes: Iterable[BaseRoute]) -> Mapping[tuple[str, str], DirectRoute]:
    """Return the direct ones among some routes by method and path."""
    return {
        (method, route.path): route
        for route in routes
        if isinstance(route, DirectRoute)
        for method in route.methods or ()
    }
