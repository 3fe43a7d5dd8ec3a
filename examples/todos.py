"""The todo API of the tutorials. Its callers come from the identity service: a scope lets them read, a role write.

    uvicorn examples.todos:app --port 8001

`make example-todos` starts it beside an identity service and prints what to try. The lists live in this process.
"""

import os
from itertools import count
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException
from pydantic import BaseModel, Field

from identity_service.verifier import Claims, Verifier
from identity_service.verifier.fastapi import Bearer

MOST_TODOS = 100

auth = Bearer(Verifier(os.environ.get("IDENTITY_ISSUER_URL", "http://localhost:8000"), audience="api"))
Reader = Annotated[Claims, Depends(auth.require(scope="todos:read"))]
Editor = Annotated[Claims, Depends(auth.require(role="editor"))]


class NewTodo(BaseModel):
    title: Annotated[str, Field(min_length=1, max_length=200, examples=["Water the plants"])]


class Todo(NewTodo):
    id: int
    done: bool = False


app = FastAPI(title="Todos")
lists: dict[str, dict[int, Todo]] = {}
ids = count(1)


@app.get("/todos/")
def list_todos(caller: Reader) -> list[Todo]:
    """The caller's own list. A plain function runs in a thread; the guard before it does not."""
    return list(lists.get(caller.subject, {}).values())


@app.post("/todos/", status_code=201)
async def add_todo(caller: Editor, new: NewTodo) -> Todo:
    """Add to the caller's own list."""
    own = lists.setdefault(caller.subject, {})
    if len(own) >= MOST_TODOS:
        raise HTTPException(409, f"A list has at most {MOST_TODOS} todos.")
    todo = Todo(id=next(ids), title=new.title)
    own[todo.id] = todo
    return todo


@app.put("/todos/{todo_id}/done")
async def finish_todo(caller: Editor, todo_id: int) -> Todo:
    """Mark one of the caller's own todos as done."""
    todo = find(caller, todo_id)
    todo.done = True
    return todo


@app.delete("/todos/{todo_id}", status_code=204)
async def delete_todo(caller: Editor, todo_id: int) -> None:
    """Delete one of the caller's own todos."""
    find(caller, todo_id)
    del lists[caller.subject][todo_id]


def find(caller: Claims, todo_id: int) -> Todo:
    """Look in the caller's own list only: somebody else's todo does not exist for them."""
    try:
        return lists[caller.subject][todo_id]
    except KeyError:
        raise HTTPException(404, "There is no such todo.") from None
