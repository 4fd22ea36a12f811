"""What tests of the integration run on ranks, beside whole forwards: caches, compilation, hooks, captured outputs."""

from __future__ import annotations

import os
import re
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import tiny_models as tiny
import torch
from tiny_models import PROMPT
from torch import Tensor

from tpfuse.errors import Unsupported
from tpfuse.launch import Rank


def cache_shapes(rank: Rank, path: Path, mode: str) -> list[tuple[int, ...]]:
    """Shapes of the keys of every attention layer after the prompt."""
    with tiny.closing(tiny.load(path, mode, rank.world)) as model:
        cache = model(torch.tensor(PROMPT), use_cache=True).past_key_values
        return [tuple(layer.keys.shape) for layer in cache.layers if getattr(layer, "keys", None) is not None]


def hidden_states(rank: Rank, path: Path, mode: str) -> dict[str, Any]:
    """What output_hidden_states gives, what a forward after it costs, and what hooks see."""
    with tiny.closing(tiny.load(path, mode, rank.world)) as model:
        prompt = torch.tensor(PROMPT)
        captured = [state.detach() for state in model(prompt, output_hidden_states=True).hidden_states]
        before = tiny.calls(model) if mode != "whole" else Counter()
        model(prompt)
        after = tiny.calls(model) if mode != "whole" else Counter()
        return {"hidden_states": captured, "calls": dict(after - before)}


def hooked(rank: Rank, path: Path, mode: str, name: str, before: bool = False) -> dict[str, Any]:
    """What a hook on the module `name` of the base model sees, behind it or before it; and the logits."""
    seen: list[Any] = []
    with tiny.closing(tiny.load(path, mode, rank.world)) as model:
        module = model.model.get_submodule(name)
        if before:
            module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        else:
            module.register_forward_hook(lambda module, args, output: seen.append(output))
        logits = model(torch.tensor(PROMPT)).logits.detach()
    found = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    return {"seen": found.detach() if isinstance(found, Tensor) else repr(found), "logits": logits}


def compiled(rank: Rank, path: Path, mode: str, backend: str) -> dict[str, Any]:
    """Logits of the compiled model, twice; and how many graphs it was."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend(backend)
    with tiny.closing(tiny.load(path, mode, rank.world)) as model:
        torch._dynamo.reset()
        forward = torch.compile(model, backend=counter, fullgraph=True)
        logits = [forward(torch.tensor(PROMPT), use_cache=False).logits.detach() for _ in range(2)]
        return {"logits": logits, "graphs": counter.frame_count, "calls": dict(tiny.calls(model))}


def continuous(rank: Rank, path: Path, mode: str, tokens: int) -> list[list[int]]:
    """Greedy tokens of each prompt through continuous batching."""
    import transformers

    with tiny.closing(tiny.load(path, mode, rank.world)) as model:
        settings = transformers.GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1)
        cache = transformers.ContinuousBatchingConfig(block_size=16, num_blocks=16, max_batch_tokens=32)
        results = model.generate_batch(
            inputs=PROMPT, generation_config=settings, continuous_batching_config=cache, warmup=False
        )
        return [results[name].generated_tokens for name in sorted(results)]


def layer_alone(rank: Rank, path: Path) -> Any:
    """The output of a layer that is called outside of the model's forward."""
    with tiny.closing(tiny.load(path, "fused", rank.world)) as model, torch.no_grad():
        x = torch.randn(1, 3, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
        angles = model.model.rotary_emb(x, torch.arange(3).unsqueeze(0))
        return model.model.layers[0](x, position_embeddings=angles)


def divided_weights(model: Any) -> dict[str, Tensor]:
    """The tensors of the checkpoint that are divided over the ranks."""
    kept = {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()
        for name, tensor in model.state_dict().items()
    }
    divided = model._tpfuse.sharding
    return {name: tensor for name, tensor in divided.join(kept).items() if name in divided.parts}


def replaced_weights(rank: Rank, path: Path, how: str, compiler: str = "") -> list[Tensor]:
    """Logits; of weights that are written to; and of the same weights, replaced. compiler: of what is then called."""
    with tiny.closing(tiny.load(path, "fused", rank.world)) as model, torch.no_grad():
        torch._dynamo.reset()  # models of other tests in this process count against its limit
        forward = torch.compile(model, backend=compiler, fullgraph=True) if compiler else model
        found = [forward(torch.tensor(PROMPT), use_cache=False).logits]
        old = divided_weights(model)
        new = {name: tensor * 3 if "v_proj" in name else tensor for name, tensor in old.items()}
        model.load_state_dict(new, strict=False)
        found.append(forward(torch.tensor(PROMPT), use_cache=False).logits)
        model.load_state_dict(old, strict=False)
        if how == "assigned":
            model.load_state_dict(new, strict=False, assign=True)
        elif how == "converted":
            model.to(torch.float64).to(torch.float32).load_state_dict(new, strict=False)
        else:
            for name, parameter in model.named_parameters():
                parameter.data = parameter.data * 3 if "v_proj" in name else parameter.data
        found.append(forward(torch.tensor(PROMPT), use_cache=False).logits)
        return found


def one_product(rank: Rank, path: Path) -> list[bool]:
    """Whether q, k and v are one product: as loaded, converted, shared between processes, with v assigned."""
    found = []
    with tiny.closing(tiny.load(path, "fused", rank.world)) as model, torch.inference_mode():
        attention = model.model.layers[0].self_attn
        for change in (
            lambda: None,
            lambda: model.to(torch.bfloat16),
            lambda: attention.share_memory(),
            lambda: setattr(attention.v_proj.weight, "data", attention.v_proj.weight.data.clone()),
        ):
            change()
            model(torch.tensor(PROMPT))
            found.append(attention.together is not None)
    return found


def watched_projection(rank: Rank, path: Path, how: str) -> tuple[Tensor, Tensor]:
    """What a hook on a projection, or an adapter around it, makes of v, if it doubles it; and doubled weights."""

    class Doubled(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inner(x)

    with tiny.closing(tiny.load(path, "fused", rank.world)) as model, torch.no_grad():
        attention = model.model.layers[0].self_attn
        weight = attention.v_proj.weight
        weight.mul_(2)
        expected = model(torch.tensor(PROMPT)).logits
        weight.div_(2)
        if how == "adapter":
            attention.v_proj = Doubled(attention.v_proj)
        elif how == "hook":
            attention.v_proj.register_forward_hook(lambda module, args, output: 2 * output)
        else:
            attention.v_proj.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        return model(torch.tensor(PROMPT)).logits, expected


def other_dtypes(rank: Rank, path: Path, dtype: torch.dtype) -> list[str]:
    """Of a model that is converted to dtype, what its state dict has in another."""
    with tiny.closing(tiny.load(path, "fused", rank.world)) as model:
        return [name for name, tensor in model.to(dtype).state_dict().items() if tensor.dtype != dtype]


def copied(rank: Rank, path: Path) -> list[str]:
    """What copying a model says, and copying a part of it."""
    said = []
    with tiny.closing(tiny.load(path, "fused", rank.world)) as model:
        for module in (model, model.model, model.model.layers[0]):
            try:
                deepcopy(module)
            except Unsupported as error:
                said.append(str(error))
    return said


def reloaded(rank: Rank, path: Path) -> list[Tensor]:
    """Logits; with all weights zero; and with the checkpoint's tensors loaded again."""
    with tiny.closing(tiny.load(path, "fused", rank.world)) as model:
        found = [model(torch.tensor(PROMPT)).logits]
        kept = divided_weights(model)
        for name in kept:
            model.get_parameter(name).data.zero_()
        found.append(model(torch.tensor(PROMPT)).logits)
        model.load_state_dict(kept, strict=False)
        return [*found, model(torch.tensor(PROMPT)).logits]


def typed(rank: Rank, path: Path, mode: str, dtype: torch.dtype) -> Tensor:
    """Logits of the model in another dtype."""
    with tiny.closing(tiny.load(path, mode, rank.world, dtype=dtype)) as model:
        return model(torch.tensor(PROMPT)).logits.detach()


def refused(rank: Rank, path: Path, world: int) -> None:
    """What is checked before anything is loaded, for more ranks than there are."""
    import transformers

    from tpfuse.integrations.transformers.architecture import pattern_of
    from tpfuse.integrations.transformers.architectures import ARCHITECTURES
    from tpfuse.integrations.transformers.sharding import parameters_of

    with torch.device("meta"):
        base = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(path))
    rules = ARCHITECTURES[type(base).__name__].rules(False)
    for name, module, parameter in parameters_of(base):
        rule = rules.get(pattern_of(name))
        if rule and (split := rule.split(base.config, module._parameters[parameter])):
            for segment in split.segments:
                segment.check(world, name)


def unknown(rank: Rank, path: Path) -> tuple[Tensor, list[str]]:
    """Logits of a model that tpfuse has no description of, through `enable()`; and what was warned of."""
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = tiny.load(path, "fused", rank.world)
    with torch.no_grad():
        return model(torch.tensor(PROMPT)).logits, [str(warning.message) for warning in caught]


def registered(rank: Rank, path: Path) -> dict[str, Any]:
    """Logits and collectives of Mistral, once docs/add-a-model.md's description of it is registered."""
    from dataclasses import replace

    from tpfuse.integrations import transformers as integration
    from tpfuse.integrations.transformers.architectures import ARCHITECTURES
    from tpfuse.integrations.transformers.architectures.llama import LLAMA

    integration.register(replace(LLAMA, base="MistralModel"))
    try:
        return tiny.logits(rank, path, "fused")
    finally:
        del ARCHITECTURES["MistralModel"]


def decoded(rank: Rank, path: Path, mode: str, tokens: int, compiler: str = "") -> Tensor:
    """Greedy tokens as `tpfuse bench model` makes them: static cache, own steps, on GPUs as replays of a CUDA graph.
    compiler: of the step, which then is one graph, compiled once."""
    from tpfuse.bench.session import Session, Workload

    device = torch.device(rank.device_type)
    os.environ["LOCAL_RANK"] = str(rank.rank)
    torch.backends.cuda.matmul.allow_tf32 = False
    workload = Workload((len(PROMPT),), len(PROMPT[0]), tokens, compiler=compiler)
    once = torch._dynamo.config.patch(error_on_recompile=True)
    with tiny.closing(tiny.load(path, mode, rank.world).to(device)) as model, torch.inference_mode(), once:
        session = Session(model, len(PROMPT), workload, device)
        session.prompt.copy_(torch.tensor(PROMPT))
        session.start()
        if device.type == "cuda":
            session.capture()
        session.start()  # again: what came before must leave no trace
        found = [session.tokens.clone()]
        for _ in range(tokens - 1):
            session.graph.replay() if session.graph else session.step()
            found.append(session.tokens.clone())
        return torch.cat(found, 1).cpu()


def replaced(rank: Rank, path: Path, mode: str, names: str) -> list[bool]:
    """Of each module with such a name, whether its forward is not its class's."""
    with tiny.closing(tiny.load(path, mode, rank.world)) as model:
        return ["forward" in vars(module) for name, module in model.named_modules() if re.search(names, name)]


def uncompiled(rank: Rank) -> str:
    """What every rank says where the compiler of one of them fails."""
    from tpfuse.bench.session import _compiled

    def compiler(graph: Any, inputs: list[Any]) -> Any:
        if rank.rank == 1:
            raise ValueError("no such kernel\nand more")
        return graph

    torch._dynamo.register_backend(compiler, name="fails_on_one_rank")
    step = _compiled(lambda: torch.ones(2).add_(1), "fails_on_one_rank")
    try:
        step()
    except Unsupported as error:
        return str(error)
    return "compiled"


def logits_on_device(rank: Rank, path: Path, mode: str) -> Tensor:
    """Logits of a whole forward on this rank's GPU."""
    os.environ["LOCAL_RANK"] = str(rank.rank)
    torch.backends.cuda.matmul.allow_tf32 = False
    with tiny.closing(tiny.load(path, mode, rank.world)) as model, torch.inference_mode():
        return model(torch.tensor(PROMPT, device=rank.device_type)).logits.cpu()
