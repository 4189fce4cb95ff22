import time

from ghostify.fitting.stage_timer import StageTimer


def test_seconds_of_a_stage_add_up():
    timer = StageTimer()
    for _ in range(2):
        with timer("a"):
            time.sleep(0.01)
    assert timer.seconds["a"] > 0.015


def test_items_are_timed_without_their_use():
    def slow():
        for k in range(3):
            time.sleep(0.01)
            yield k

    timer, used = StageTimer(), []
    for k in timer.time_items("waiting", slow()):
        with timer("using"):
            time.sleep(0.02)
        used.append(k)
    assert used == [0, 1, 2]
    assert timer.seconds["waiting"] < timer.seconds["using"]
