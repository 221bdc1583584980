"""One step of the decode loop as a CUDA graph, so that a small prior does not wait for its launches.

A step of a 24-layer prior is some hundreds of kernels of a few microseconds each: launched one by one they take longer
than they run. A graph is captured once for each shape and kind of batch, and replayed for every position of every later
batch of that shape: it reads the position from the device.
"""

from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from sampling.step import State, advance, choose
from transformer.decoder import Decoder

MAX_GRAPHS = 2  # of one decoder; each holds a cache


class StepOnDevice:
    """A step whose position lives on the device and whose tensors stay where they are.

    Args:
        decoder: predicts the codes; needs Triton's decode kernel, which reads the position from the device.
        state: of the first batch; its tensors become the buffers of all later ones.

    Attributes:
        in_use: whether somebody is drawing with it; two batches at a time need two of them.
    """

    def __init__(self, decoder: Decoder, state: State) -> None:
        self._decoder = ref(decoder)  # the steps of a decoder must not keep it alive
        self.state = state
        self.in_use = False
        self.position = torch.zeros(1, dtype=torch.int32, device=state.logits.device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def load(self, state: State, position: int) -> None:
        """Begin a batch of the same shape and kind at a position."""
        if state is not self.state:
            for own, new in zip(_tensors(self.state), _tensors(state), strict=True):
                own.copy_(new)
        self.position.fill_(position)

    def __call__(self) -> None:
        """Choose codes at the position, and go on to the next one."""
        if self._graph is not None:
            self._graph.replay()
        else:
            self._step()

    def capture(self) -> None:
        """Record the step as a CUDA graph; what the buffers hold stays as it is."""
        logits, position = self.state.logits.clone(), self.position.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles kernels and sets up libraries, which a capture does not allow
            for _ in range(2):
                self._step()
                # everything else that a step writes is written again by the next at the same position
                self.state.logits.copy_(logits)
                self.position.copy_(position)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self._graph = graph

    def _step(self) -> None:
        buffer = self.state.logits
        choose(self.state, self.position)
        decoder = self._decoder()
        assert decoder is not None
        advance(decoder, self.state, self.position)
        buffer.copy_(self.state.logits)
        self.state.logits = buffer
        self.position += 1


_graphs: WeakKeyDictionary[Decoder, dict[tuple[object, ...], StepOnDevice]] = WeakKeyDictionary()


def step_on_device(decoder: Decoder, state: State, position: int) -> StepOnDevice:
    """The captured step for batches of this shape and kind, with the state loaded into its buffers."""
    known = _graphs.setdefault(decoder, {})
    kind = _kind(state)
    step = known.pop(kind, None)
    if step is None or step.in_use:
        while len(known) >= MAX_GRAPHS:
            known.pop(next(iter(known)))  # the one not used for longest
        step = StepOnDevice(decoder, state)
        step.load(state, position)
        step.capture()
    else:
        step.load(state, position)
    known[kind] = step
    return step


def _tensors(state: State) -> list[Tensor]:
    """Everything that differs from batch to batch of one kind."""
    filters = state.filters
    optional = [filters.temperature, filters.top_k, filters.top_p, filters.min_p]
    tensors = [tensor for layer in state.cache.layers for tensor in (layer.keys, layer.values)]
    tensors += [state.logits, state.codes, state.log_probabilities, state.guided, state.draws, state.weights]
    tensors += [tensor for tensor in optional if tensor is not None]
    return tensors + ([] if state.forced is None else [*state.forced])


def _kind(state: State) -> tuple[object, ...]:
    """What decides which kernels a step launches: shapes, and which filters there are."""
    filters = state.filters
    return (
        tuple(state.codes.shape),
        len(state.guided),
        *(tensor is None for tensor in (filters.temperature, filters.top_k, filters.top_p, filters.min_p)),
        filters.largest_k,
        state.forced is None,
    )
