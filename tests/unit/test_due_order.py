"""The order of waiting jobs: as if all were sorted at each step, at the cost of a few."""

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from viralfx.adapters.memory.due import DueOrder

START = datetime(2026, 1, 6, 12, tzinfo=UTC)

steps = st.lists(
    st.tuples(
        st.sampled_from(["add", "discard", "pop"]), st.sampled_from("abcdef"), st.integers(0, 5)
    ),
    max_size=60,
)


@given(steps)
def test_the_order_is_that_of_a_sorted_list(steps: list[tuple[str, str, int]]) -> None:
    """Whatever was discarded and added again, at whatever time."""
    order, model = DueOrder(), dict[str, datetime]()
    for step, job_id, second in steps:
        moment = START + timedelta(seconds=second)
        if step == "add":
            order.discard(job_id)
            order.add(job_id, moment)
            model[job_id] = moment
        elif step == "discard":
            order.discard(job_id)
            model.pop(job_id, None)
        else:
            expected = sorted((due, name) for name, due in model.items() if due <= moment)
            assert list(order.pop_until(moment)) == expected
            for _, name in expected:
                del model[name]
        assert len(order) == len(model)
        assert order.first() == min(((due, name) for name, due in model.items()), default=None)


def test_what_was_discarded_does_not_pile_up() -> None:
    """However many jobs of a far future are cancelled."""
    order = DueOrder()
    for number in range(10_000):
        order.add(str(number), START + timedelta(days=number))
        if number >= 10:
            order.discard(str(number))

    assert len(order) == 10
    assert len(order._heap) < 100
