"""A task in a module of its own: TASK_MODULES=greet, beside it."""

from typing import TypedDict

from viralfx import task


class Guest(TypedDict):
    name: str


@task("greet", queue="notifications")
async def greet(guest: Guest) -> str:
    return f"Hello, {guest['name']}"
