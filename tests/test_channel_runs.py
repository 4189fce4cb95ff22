from hypothesis import given
from hypothesis import strategies as st

from ghostify.pruning.channel_runs import ChannelRun, join_runs, pieces_of

sizes = st.lists(st.integers(1, 4), min_size=1, max_size=5)


def labels(runs):
    """The run, and the position in it, of every channel."""
    return [(id(piece), k) for piece in pieces_of(runs) for k in range(piece.size)]


@given(st.lists(sizes, min_size=2, max_size=4), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=4))
def test_joined_runs_are_the_finest_partition_into_runs(shapes, pairs):
    """Against a union-find over single channels: what must change together has one label."""
    values = [tuple(ChannelRun(size) for size in shape) for shape in shapes]
    parent = {}

    def root(channel):
        while channel in parent:
            channel = parent[channel]
        return channel

    for a, b in pairs:
        left, right = values[a % len(values)], values[b % len(values)]
        if sum(run.size for run in left) != sum(run.size for run in right):
            continue
        join_runs(left, right)
        for k in range(sum(run.size for run in left)):
            first, second = root((a % len(values), k)), root((b % len(values), k))
            if first != second:
                parent[first] = second
    label_of = {(v, k): label for v, runs in enumerate(values) for k, label in enumerate(labels(runs))}
    for first in label_of:
        for second in label_of:
            assert (root(first) == root(second)) == (label_of[first] == label_of[second])


def test_a_run_can_be_joined_with_a_shifted_copy_of_itself():
    run, first, last = ChannelRun(4), ChannelRun(2), ChannelRun(2)
    assert join_runs((first, run), (run, last))
    assert len({id(piece) for piece in pieces_of((first, run, last))}) == 1


def test_joined_runs_have_the_obstacles_of_both():
    run, first, last = ChannelRun(4, count_obstacle="read"), ChannelRun(1), ChannelRun(3, order_obstacle="returned")
    join_runs((first, last), (run,))
    obstacles = [(piece.size, piece.count_obstacle, piece.order_obstacle) for piece in run.pieces()]
    assert obstacles == [(1, "read", None), (3, "read", "returned")]
    assert not join_runs((run,), (first, last))
