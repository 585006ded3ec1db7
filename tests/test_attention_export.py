"""What is done with a module of PyTorch's, by the dense backend: meta and fake tensors, tracing, export,
compilation in one graph, dynamic quantisation."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch._dynamo.testing
from attention_cases import FACTORIES, E, H, L, N, each_module, make, make_inputs, relative
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from attention_engine.native_build import unavailable
from attention_kernels import use_backend
from attention_module import AttentionModule


class SelfAttention(nn.Module):
    def __init__(self, attention: AttentionModule) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.fixture(autouse=True)
def dense() -> Iterator[None]:
    with use_backend("dense"):
        yield


Transform = Callable[[nn.Module, Tensor], Callable[[Tensor], Tensor]]
TRANSFORMS: dict[str, Transform] = {
    "compiled": lambda module, _: torch.compile(module, fullgraph=True, backend="aot_eager"),
    "exported": lambda module, x: torch.export.export(module, (x,)).module(),
    "traced": lambda module, x: torch.jit.trace(module, (x,)),
}


@pytest.mark.parametrize("name", ["gravitational multi-timescale force", "heads adaptive"])
@pytest.mark.parametrize("transform", list(TRANSFORMS))
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_compiled_exported_or_traced_module_computes_the_same(name: str, transform: str) -> None:
    module, x = SelfAttention(make(name)).eval(), make_inputs().query
    expected = module(x)
    torch._dynamo.reset()
    found = TRANSFORMS[transform](module, x)
    torch.testing.assert_close(found(x), expected)
    torch.testing.assert_close(found(2 * x), module(2 * x))


@pytest.mark.parametrize("backend", ["native", "tiled"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning")
def test_other_backends_are_a_step_that_the_compiler_leaves_as_it_is(backend: str) -> None:
    if backend == "native" and (reason := unavailable(E // H, 2)):
        pytest.skip(reason)
    module, x = SelfAttention(make("gravitational force")), make_inputs().query
    torch._dynamo.reset()
    counted = torch._dynamo.testing.CompileCounter()
    with use_backend(backend):
        found, expected = torch.compile(module, backend=counted)(x), module(x)
        torch.testing.assert_close(found, expected)
        parameters = [*module.parameters()]
        gradients = ([*torch.autograd.grad(y.square().sum(), parameters)] for y in (found, expected))
        torch.testing.assert_close(*gradients)
    assert counted.frame_count == 2  # what is before it and what is after it


@each_module
def test_shapes_come_from_meta_and_fake_tensors_alone(name: str) -> None:
    module = SelfAttention(FACTORIES[name](device="meta"))
    assert module(torch.empty(N, L, E, device="meta")).shape == (N, L, E)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert SelfAttention(FACTORIES[name]())(torch.empty(N, L, E)).shape == (N, L, E)


@each_module
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_dynamic_quantisation_keeps_the_output_within_some_percent(name: str) -> None:
    module, x = SelfAttention(make(name)).eval(), make_inputs().query
    quantised = torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)
    assert relative(quantised(x), module(x)) < 0.05
