from hypothesis import given, strategies as st

from adapter.controller.reservations import PER_NAMESPACE, TTL_S, Reservations


def test_what_is_promised_counts_until_it_is_dropped_or_its_time_is_over():
    now = [0.0]
    reservations = Reservations(clock=lambda: now[0])
    reservations.add("a", "n1", {"nvidia.com/gpu": 1})
    now[0] = 10
    reservations.add("b", "n1", {"nvidia.com/gpu": 2, "cpu": 500})
    assert reservations.on("n1") == {"nvidia.com/gpu": 3, "cpu": 500}
    now[0] = TTL_S
    assert reservations.expire() == {"n1"}
    assert reservations.on("n1") == {"nvidia.com/gpu": 2, "cpu": 500}
    assert reservations.drop("b") == "n1"
    assert reservations.drop("b") == ""
    assert not reservations.on("n1")


MARKS, NODES = st.sampled_from("abc"), st.sampled_from(["n1", "n2"])
STEPS = st.lists(st.one_of(st.tuples(MARKS, NODES), MARKS, st.floats(0, 40)))


@given(STEPS)
def test_nothing_is_promised_for_longer_than_its_time_nor_twice(steps):
    now = [0.0]
    reservations, last = Reservations(clock=lambda: now[0]), {}
    for step in steps:
        if isinstance(step, tuple):
            reservations.add(*step, {"gpu": 1})
            last[step[0]] = step[1], now[0]
        elif isinstance(step, str):
            reservations.drop(step)
            last.pop(step, None)
        else:
            now[0] += step
        reservations.expire()
        alive = [node for node, at in last.values() if now[0] < at + TTL_S]
        assert {node: reservations.on(node)["gpu"] for node in ("n1", "n2")} == {
            node: alive.count(node) for node in ("n1", "n2")
        }


def test_one_namespace_cannot_have_all_that_there_is():
    now = [0.0]
    reservations = Reservations(clock=lambda: now[0])
    for number in range(PER_NAMESPACE + 5):
        reservations.add(f"greedy/{number}", "n1", {"gpu": 1})
    reservations.add("other/1", "n1", {"gpu": 1})
    assert reservations.on("n1")["gpu"] == PER_NAMESPACE + 1
    reservations.drop("greedy/0")
    reservations.add("greedy/1", "n1", {"gpu": 1})
    reservations.add("greedy/new", "n1", {"gpu": 1})
    reservations.add("greedy/newer", "n1", {"gpu": 1})
    assert reservations.on("n1")["gpu"] == PER_NAMESPACE + 1
    now[0] = TTL_S
    reservations.expire()
    reservations.add("greedy/newer", "n1", {"gpu": 1})
    assert reservations.on("n1")["gpu"] == 1
