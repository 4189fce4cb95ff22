"""Straight lines from one dense convolution to the next, on which maps can be left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import fx, nn

from ghostify.graph.batchnorm import BatchNorm
from ghostify.graph.op_queries import is_channel_independent, is_channel_independent_module, is_mul, is_standard_conv
from ghostify.modules.hooks import has_hooks
from ghostify.tracing.program import Convolution, Program, called
from ghostify.tracing.views import marks_of
from ghostify.tracing.wiring import Wiring, only_user

SPATIAL = ((2, 3), (-2, -1))
POOLS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


@dataclass(frozen=True)
class Member:
    """A convolution on a link: whether it `makes` the maps that may be left out, and whether it `reads` them; `norms`
    behind it, within the part, hold the same maps."""

    conv: Convolution
    makes: bool
    reads: bool
    norms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Link:
    """A dense convolution whose maps only another one reads, behind what treats every map by itself.

    A map on the line that is nearly a linear combination of others at its end is a ghost that costs nothing: the
    consumer's filters take it up. `line` is the producer, depthwise convolutions between, and the consumer; `gates` are
    the two convolutions of each squeeze-excite block on the way.
    """

    line: tuple[Member, ...]
    gates: tuple[Member, ...] = ()

    @property
    def producer(self) -> Convolution:
        return self.line[0].conv

    @property
    def consumer(self) -> Convolution:
        return self.line[-1].conv

    @property
    def members(self) -> tuple[Member, ...]:
        return self.line + self.gates

    @property
    def maps(self) -> int:
        return self.producer.outputs


@dataclass(frozen=True)
class Narrowing:
    """The maps that are left of a convolution on a link: `keeps` of its outputs and `reads` of its inputs, None where
    all are; `norms` behind it, within the part, lose the same maps."""

    keeps: tuple[int, ...] | None = None
    reads: tuple[int, ...] | None = None
    norms: tuple[str, ...] = ()

    def left_of(self, conv: Convolution) -> Convolution:
        """The convolution with so few maps."""
        return left_of(conv, *(None if maps is None else len(maps) for maps in (self.keeps, self.reads)))


def left_of(conv: Convolution, makes: int | None, reads: int | None) -> Convolution:
    """A dense or depthwise convolution that makes and reads so many maps (None: all)."""
    outputs = conv.outputs if makes is None else makes
    if conv.groups > 1:
        return replace(conv, inputs=outputs, outputs=outputs, groups=outputs)
    return replace(conv, inputs=conv.inputs if reads is None else reads, outputs=outputs)


def narrowings(kept: Mapping[Link, tuple[int, ...]]) -> dict[str, Narrowing]:
    """What keeping these maps of links leaves of their convolutions, by name: one may read one and make another."""
    found: dict[str, Narrowing] = {}
    for link, own in kept.items():
        for member in link.members:
            narrowing = found.get(member.conv.name, Narrowing())
            if member.makes:
                narrowing = replace(narrowing, keeps=own, norms=member.norms)
            if member.reads:
                narrowing = replace(narrowing, reads=own)
            found[member.conv.name] = narrowing
    return found


def links_of(program: Program) -> Iterator[Link]:
    """Every link of the program, in order of the producers."""
    for path, part in program.parts.items():
        wiring = Wiring(part)
        known = {call.node: conv for conv in program.convolutions if conv.part == path for call in conv.calls}
        for conv in dict.fromkeys(known.values()):
            if conv.groups == 1 and _can_lose_maps(wiring, conv):
                found = _Following(wiring, known, conv).link()
                if found is not None:
                    yield found


class _Following:
    """The way from a convolution's output to the next dense one."""

    def __init__(self, wiring: Wiring, known: dict[str, Convolution], conv: Convolution) -> None:
        self.wiring, self.known = wiring, known
        self.line, self.gates = [Member(conv, makes=True, reads=False)], list[Member]()
        self.node = wiring.nodes[conv.calls[0].node]

    def link(self) -> Link | None:
        """The whole way, or None where anybody else reads the maps, or mixes them."""
        while True:
            user = only_reader(self.node)
            if user is None:
                product = self._scaled()
                if product is None:
                    return None
                self.node = product
                continue
            self.node, conv = user, self.known.get(user.name)
            if conv is None:
                if not self._treats_alike(user):
                    return None
            elif not _can_lose_maps(self.wiring, conv):
                return None
            elif conv.groups == 1:
                self.line.append(Member(conv, makes=False, reads=True))
                return Link(tuple(self.line), tuple(self.gates))
            elif conv.groups == conv.inputs == conv.outputs:
                self.line.append(Member(conv, makes=True, reads=True))
            else:
                return None

    def _scaled(self) -> fx.Node | None:
        """The product of the maps with a gate of their own means: pooled, reduced, expanded, activated."""
        users = list(self.node.users)
        product = next((u for u in users if is_mul(u) and self.node in u.args), None)
        if product is None or len(users) != 2 or marks_of(self.node):
            return None
        gate = next((a for a in product.args if isinstance(a, fx.Node) and a is not self.node), None)
        alike = partial(is_channel_independent, self.wiring.module)
        while gate is not None and gate.name not in self.known and only_user(gate) and alike(gate):
            gate = gate.all_input_nodes[0]
        if gate is None or gate.name not in self.known or only_user(gate) is None or marks_of(gate):
            return None
        pooled = next(u for u in users if u is not product)
        expand, squeezed = self.known[gate.name], only_reader(pooled)
        reduce = None if squeezed is None else self.known.get(squeezed.name)
        if reduce is None or not self._pools(pooled) or not self._leads(squeezed, gate):
            return None
        if not all(c.groups == 1 and _can_lose_maps(self.wiring, c) for c in (reduce, expand)):
            return None
        if expand.outputs != self.line[0].conv.outputs:
            return None
        self.gates += [Member(reduce, makes=False, reads=True), Member(expand, makes=True, reads=False)]
        return product

    def _pools(self, node: fx.Node) -> bool:
        """Whether a node pools every map by itself, as squeeze-excite blocks begin."""
        if node.op == "call_module":
            inner = called(self.wiring.module, node)
            return isinstance(inner, POOLS) and not has_hooks(inner)
        over = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        means = node.op == "call_method" and node.target == "mean" and bool(node.kwargs.get("keepdim"))
        return means and isinstance(over, tuple | list) and tuple(over) in SPATIAL

    @staticmethod
    def _leads(start: fx.Node | None, end: fx.Node) -> bool:
        """Whether a straight line leads from one node to another."""
        while start is not None and start is not end:
            start = only_reader(start)
        return start is end

    def _treats_alike(self, node: fx.Node) -> bool:
        """Whether a node treats every map by itself; a norm is noted."""
        inner = called(self.wiring.module, node) if node.op == "call_module" else None
        if not isinstance(inner, BatchNorm):
            return is_channel_independent(self.wiring.module, node)
        last = self.line[-1]
        self.line[-1] = replace(last, norms=(*last.norms, str(node.target)))
        return self.wiring.used_once(node) and not has_hooks(inner) and blind_inside(inner)


def only_reader(node: fx.Node) -> fx.Node | None:
    """The one node that reads this one, as its first argument, where no method ends."""
    user = None if marks_of(node) else only_user(node)
    return user if user is not None and user.args and user.args[0] is node else None


def blind_inside(norm: nn.Module) -> bool:
    """Whether what a norm holds, such as its activation, treats every channel alike, and no hook looks on."""
    return all(map(is_channel_independent_module, norm.children()))


def _can_lose_maps(wiring: Wiring, conv: Convolution) -> bool:
    """Whether a convolution is one module of its class, called once, by what the graph shows."""
    if conv.obstacle is not None or conv.kind == "conv2d" or len(conv.calls) != 1:
        return False
    node = wiring.nodes[conv.calls[0].node]
    inner: Any = called(wiring.module, node)
    return is_standard_conv(inner) and wiring.used_once(node) and not has_hooks(inner)
