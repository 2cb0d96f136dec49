"""A task of one's own: TASK_MODULES=docs.examples.greet."""

from typing import TypedDict

from viralfx import task


class Guest(TypedDict):
    name: str


@task("greet", queue="notifications")
async def greet(guest: Guest) -> str:
    return f"Hello, {guest['name']}"
