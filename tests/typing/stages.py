"""The forms of a shutdown stage that an application may pass; checked by mypy, never run."""

from viralfx import OperationsConfig


class Orders:
    """Is a stage with an object."""

    async def run(self, budget: float) -> None:
        """Stop within the budget."""


async def save(budget: float) -> None:
    """Save within the budget."""


async def endless() -> None:
    """Take no budget."""


def blocking(budget: float) -> None:
    """Block."""


OperationsConfig(drain_stages={"orders": Orders()}, save_stages={"state": save})
OperationsConfig(close_stages={"pool": save, "orders": Orders(), "bound": Orders().run})
OperationsConfig(save_stages={"state": endless})  # type: ignore[dict-item]  # it needs the budget
OperationsConfig(save_stages={"state": blocking})  # type: ignore[dict-item]  # it must be `async`
