import time

from ghostify.fitting.stage_timer import StageTimer


def test_blocks_of_a_name_add_up():
    clock = StageTimer()
    for _ in range(2):
        with clock("a"):
            time.sleep(0.01)
    assert clock.seconds["a"] > 0.015


def test_waiting_for_items_counts_but_using_them_does_not():
    def slow():
        for k in range(3):
            time.sleep(0.01)
            yield k

    clock, seen = StageTimer(), []
    for k in clock.time_items("waiting", slow()):
        with clock("using"):
            time.sleep(0.02)
        seen.append(k)
    assert seen == [0, 1, 2]
    assert clock.seconds["waiting"] < clock.seconds["using"]
