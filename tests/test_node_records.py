import operator
import pickle

import torch
from torch import fx
from torch.nn import functional as F

from ghostify.graph.node_records import build_graph, record_nodes


def graph():
    made = fx.Graph()
    x = made.placeholder("x", default_value=None)
    a = made.call_function(F.max_pool2d, (x, 2), {"stride": 1})
    b = made.call_function(operator.getitem, (a, (slice(None, 2), ...)))
    c = made.call_method("mul", (b, 2.5))
    d = made.call_function(torch.cat, ([b, c],), {"dim": 0})
    made.output({"both": (d, a), "dtype": torch.float16})
    return made


def test_recorded_nodes_survive_a_pickle_and_build_the_same_graph():
    made = graph()
    assert str(build_graph(pickle.loads(pickle.dumps(record_nodes(made))))) == str(made)


def test_functions_that_pytorch_defines_within_others_are_found_by_their_public_names():
    (target,) = [n.target for n in build_graph(pickle.loads(pickle.dumps(record_nodes(graph())))).nodes][1:2]
    assert target is F.max_pool2d


def test_entries_of_this_package_are_recorded_and_those_of_others_are_not():
    made = graph()
    first = next(iter(made.nodes))
    first.meta |= {"ghostify_x": 3, "tensor_meta": object()}
    assert next(iter(build_graph(record_nodes(made)).nodes)).meta == {"ghostify_x": 3}
