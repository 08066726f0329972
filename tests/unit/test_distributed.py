"""Two gloo processes compute what one does with the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.elastic.utils.distributed import get_free_port

from llm2clip_vlm import distributed
from llm2clip_vlm.losses.contrastive import NO_CANDIDATE

WORKER = """
import json, sys
import torch, torch.distributed as dist, torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from llm2clip_vlm.distributed import (
    gather_with_grad, is_main, max_over_ranks, rank, shared_out, teardown, world_size)
from llm2clip_vlm.losses import contrastive as losses
from llm2clip_vlm.losses.contrastive import (
    NO_CANDIDATE, caption_contrastive_loss, contrastive_loss, sigmoid_loss)

class Towers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text = torch.nn.Linear(6, 5), torch.nn.Linear(4, 5)
        self.logit_scale = torch.nn.Parameter(torch.tensor(3.0))
    def forward(self, x, y):
        image, text = F.normalize(self.image(x), dim=-1), F.normalize(self.text(y), dim=-1)
        return image, text, self.logit_scale.exp()

torch.manual_seed(0)
towers = Towers()
x, y = torch.randn(8, 6), torch.randn(8, 4)
ids = torch.tensor([0, 1, 2, 3, 4, 1, 6, 0])
if world_size() > 1:
    try:
        gather_with_grad(x)
    except RuntimeError as error:
        assert "process group" in str(error)
    else:
        raise AssertionError("no error before the process group exists")
    dist.init_process_group("gloo")
    model = DistributedDataParallel(towers)
    share = 8 // world_size()
    mine = slice(share * rank(), share * rank() + share)
else:
    model, mine = towers, slice(None)
# two texts an image, and hard negatives: as many slots on every rank, some of them empty
y2, ids2 = torch.randn(16, 4), torch.arange(16) % 11
z, hard_ids = torch.randn(8, 4), torch.tensor([0, -1, NO_CANDIDATE, 2, -1, NO_CANDIDATE, 6, -1])
mine2 = slice(2 * mine.start, 2 * mine.stop) if mine.start is not None else mine
report = {}
kinds = ("contrastive", "several", "hard", "sigmoid")
for name in ("caption", "full", *kinds, *(kind + "-chunked" for kind in kinds)):
    model.zero_grad()
    name, chunked = name.removesuffix("-chunked"), name.endswith("-chunked")
    losses.CHUNK_LOGITS = 24 // world_size() if chunked else 2**22
    texts = {"several": y2[mine2], "sigmoid": y2[mine2], "hard": torch.cat([y[mine], z[mine]])}
    image, text, scale = model(x[mine], texts.get(name, y[mine]))
    if name == "contrastive":
        loss = contrastive_loss(
            image, text, scale, caption_ids=ids[mine], label_smoothing=0.1, gather=True)
    elif name == "caption":
        loss = caption_contrastive_loss(image, text, scale, ids=ids[mine], gather=True)
    elif name == "several":
        loss = contrastive_loss(
            image, text, scale, caption_ids=ids2[mine2], label_smoothing=0.1, gather=True)
    elif name == "hard":
        text, negatives = text.chunk(2)
        loss = caption_contrastive_loss(
            image, text, scale, ids=ids[mine], negatives=negatives, negative_ids=hard_ids[mine],
            gather=True)
    elif name == "sigmoid":
        loss = sigmoid_loss(
            image, text, scale, -2.0, caption_ids=ids2[mine2], gather=True)
    else:  # every rank computes the whole loss
        loss = contrastive_loss(gather_with_grad(image), gather_with_grad(text), scale)
    loss.backward()
    mean = loss.detach().clone()
    if world_size() > 1:
        dist.all_reduce(mean)
        mean /= world_size()
    report[f"{name} {chunked}"] = {"loss": mean.item(), "world": world_size()} | {
        n: p.grad.flatten().tolist() for n, p in towers.named_parameters()}
with torch.no_grad():
    assert torch.equal(gather_with_grad(x[mine]), x)
    assert torch.equal(gather_with_grad(ids[mine]), ids)
assert max_over_ranks(rank(), 9 - rank()) == [world_size() - 1, 9]
worked = []
assert shared_out(range(5), lambda n: worked.append(n) or n * n) == [0, 1, 4, 9, 16]
assert worked == list(range(5))[rank() :: world_size()]
if is_main():
    json.dump(report, open(sys.argv[1], "w"))
teardown()
"""


def by_loops(name: str) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the worker's case in float64, one similarity at a time."""
    torch.manual_seed(0)
    towers = {"image": torch.nn.Linear(6, 5), "text": torch.nn.Linear(4, 5)}
    logit_scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    x, y, y2, z = torch.randn(8, 6), torch.randn(8, 4), torch.randn(16, 4), torch.randn(8, 4)
    ids = [0, 1, 2, 3, 4, 1, 6, 0]
    hard_ids = [0, -1, NO_CANDIDATE, 2, -1, NO_CANDIDATE, 6, -1]
    k = 2 if name in ("several", "sigmoid") else 1
    if k == 2:
        ids, y = [number % 11 for number in range(16)], y2

    def unit(part: str, rows: Tensor) -> Tensor:
        return F.normalize(towers[part].double()(rows.double()), dim=-1)

    images, texts, negatives = unit("image", x), unit("text", y), unit("text", z)
    scale = logit_scale.exp()

    def related(i: int, t: int) -> bool:  # equal captions, but not the image's own
        return t // k != i and ids[t] in ids[k * i : k * i + k]

    def entropy(scores: dict[Any, Tensor], own: list[Any]) -> Tensor:
        total = torch.stack(list(scores.values())).logsumexp(0)
        right = sum(total - scores[key] for key in own) / len(own)
        spread = sum(total - score for score in scores.values()) / len(scores)
        share = 0.1 if name in ("contrastive", "several") else 0.0
        return (1 - share) * right + share * spread

    terms = []
    for i in range(8):
        own = [k * i + n for n in range(k)]
        among: dict[Any, Tensor] = {
            t: scale * images[i] @ texts[t] for t in range(8 * k) if not related(i, t)
        }
        if name == "sigmoid":
            for t, score in among.items():
                terms.append(F.softplus((2.0 - score) if t in own else (score - 2.0)) / 8)
            continue
        if name == "hard":
            for n, number in enumerate(hard_ids):
                if number not in (NO_CANDIDATE, ids[i]):
                    among["hard", n] = scale * images[i] @ negatives[n]
        terms.append(entropy(among, own) / 8 / 2)
    for t in range(8 * k) if name != "sigmoid" else []:
        back = {i: scale * images[i] @ texts[t] for i in range(8) if not related(i, t)}
        terms.append(entropy(back, [t // k]) / (8 * k) / 2)
    loss = torch.stack(terms).sum()
    loss.backward()
    grads = {f"{part}.{n}": p.grad for part, m in towers.items() for n, p in m.named_parameters()}
    return loss.item(), {"logit_scale": logit_scale.grad, **grads}  # type: ignore[dict-item]


def run_worker(folder: Path, world_size: int, repo_root: Path) -> dict[str, dict[str, list[float]]]:
    target = folder / f"{world_size}.json"
    port = str(get_free_port())
    processes = []
    for rank in range(world_size):
        env = os.environ | {"PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1"}
        env |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-c", WORKER, str(target)]
        processes.append(subprocess.Popen(command, env=env))
    assert [process.wait(timeout=600) for process in processes] == [0] * world_size
    loaded: dict[str, dict[str, list[float]]] = json.loads(target.read_text())
    return loaded


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_loss_and_gradients_are_those_of_one_process(
    tmp_path: Path, repo_root: Path, size: int
) -> None:
    one, two = (run_worker(tmp_path, processes, repo_root) for processes in (1, size))
    assert two["contrastive False"]["world"] == size
    assert len(two) == 10
    for loss in one:
        if (name := loss.split()[0]) not in ("caption", "full"):
            value, grads = by_loops(name)
            assert two[loss]["loss"] == pytest.approx(value, rel=1e-5), loss
            for part, grad in grads.items():
                got = torch.tensor(two[loss][part], dtype=torch.float64)
                torch.testing.assert_close(got, grad.flatten(), atol=1e-5, rtol=1e-4)
        assert two[loss].pop("loss") == pytest.approx(one[loss].pop("loss"), rel=1e-6)
        assert set(one[loss]) > {"logit_scale", "image.weight", "text.weight"}
        for name in set(one[loss]) - {"world"}:
            got, want = torch.tensor(two[loss][name]), torch.tensor(one[loss][name])
            assert want.abs().max() > 1e-2  # the bound below means something
            assert (got - want).abs().max() < 1e-6 * max(1.0, want.abs().max()), (loss, name)


def test_a_single_process_needs_no_group() -> None:
    tensor = torch.ones(2, requires_grad=True)
    assert distributed.gather_with_grad(tensor) is tensor
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    distributed.barrier()
    distributed.teardown()


def test_rank_comes_from_the_launcher_before_there_is_a_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (1, 2, False)


def test_files_that_another_machine_wrote_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main process sees `a` with 3 bytes and `b`; here `b` is late, and then `a` is another."""
    (tmp_path / "a").write_text("abc")
    monkeypatch.setattr(distributed, "shared_out", lambda *_: [{"a": 3, "b": 1}])
    late = threading.Timer(0.3, (tmp_path / "b").write_text, ["b"])
    late.start()
    distributed.await_files(tmp_path)
    assert (tmp_path / "b").exists()
    (tmp_path / "a").write_text("old")
    distributed.await_files(tmp_path, patience_s=0)
    (tmp_path / "a").write_text("older")
    with pytest.raises(FileNotFoundError, match=r"/a: rank 0 has written it, but .* must share"):
        distributed.await_files(tmp_path, patience_s=0.3)
