"""One place picks the kernels, with a reason; every set of them computes the same block."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exact_cpu import cpu_multiplies_exactly
from small_model import fused, random_tensors, relative_error
from torch import Tensor

from ideogram_app.catalog.models import Branch
from ideogram_app.checkpoints.prepared.packed_file import PackedWeight
from ideogram_app.checkpoints.prepared.store import Store
from ideogram_app.errors import DeviceError, RequestError
from ideogram_app.kernels import choice
from ideogram_app.kernels.choice import BETWEEN_MATRICES, choose_kernels, compiled_kernels, kernels, kernels_note
from ideogram_app.kernels.contract import Kernels
from ideogram_app.kernels.plain import PLAIN
from ideogram_app.machine.capabilities import products
from ideogram_app.machine.hardware import Hardware
from ideogram_app.model import loader
from ideogram_app.model.transformer.assemble import Placement, assemble
from ideogram_app.model.transformer.layers import W4A8
from ideogram_app.quantization import int8, k_quants
from ideogram_app.quantization.rotation import rotate

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BRANCH = Branch(1, 64, 4, 256, 64, 130)
SETTINGS = {"rope_theta": 1000, "mrope_section": (12, 10, 10)}


@pytest.mark.parametrize(
    ("device", "capability", "name", "because"),
    [
        (CUDA, None, "triton", "compiles"),
        (CUDA, (8, 6), "triton", "compiles"),
        (CUDA, (12, 0), "triton", "compiles"),
        (CUDA, (7, 5), "int_mm", "Turing"),
        (CUDA, (6, 1), "plain", "sm_61"),
        (torch.device("mps"), None, "plain", "mps"),
        (torch.device("xpu"), None, "plain", "xpu"),
    ],
)
def test_each_device_gets_its_kernels_and_a_reason(
    device: torch.device, capability: tuple[int, int] | None, name: str, because: str
) -> None:
    chosen, reason = choose_kernels(device, capability, triton="", int_mm="")
    assert chosen == name and because in reason


NO_COMPILER = "Triton cannot start: it needs a C compiler. This helps: sudo apt install gcc"


@pytest.mark.parametrize("capability", [None, (7, 5), (8, 6), (12, 0)])
def test_where_triton_cannot_start_torchs_products_run_and_say_why(capability: tuple[int, int] | None) -> None:
    assert choose_kernels(CUDA, capability, triton=NO_COMPILER, int_mm="") == ("torch", NO_COMPILER)
    name, reason = choose_kernels(CUDA, capability, triton=NO_COMPILER, int_mm="torch._int_mm does not run here")
    assert name == "plain" and NO_COMPILER in reason and "_int_mm" in reason


def test_this_machine_is_asked_only_where_the_answer_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> str:
        raise AssertionError("asked")

    monkeypatch.setattr(choice, "usable_triton", never)
    monkeypatch.setattr(choice, "int_mm_problem", never)
    for device, capability in ((CPU, None), (torch.device("mps"), None), (CUDA, (6, 1))):
        choose_kernels(device, capability)
    monkeypatch.setattr(choice, "usable_triton", lambda kind: "")
    assert choose_kernels(CUDA, (8, 6))[0] == "triton"
    monkeypatch.setattr(choice, "usable_triton", lambda kind: NO_COMPILER)
    monkeypatch.setattr(choice, "int_mm_problem", lambda device: "")
    assert choose_kernels(CUDA, (8, 6)) == ("torch", NO_COMPILER)


@pytest.mark.parametrize("kind", ["cuda", "rocm", "mps", "xpu", "cpu"])
@pytest.mark.parametrize("capability", [(6, 1), (7, 5), (8, 6), (10, 3), (12, 0)])
@pytest.mark.parametrize("problem", ["", NO_COMPILER])
def test_a_plan_knows_which_kernels_will_run(kind: str, capability: tuple[int, int], problem: str) -> None:
    card = Hardware(kind=kind, name="a card", compute_capability=capability, triton_problem=problem)
    device = torch.device("cuda" if kind == "rocm" else kind)
    nvidias = capability if kind == "cuda" else None
    assert products(card) == choose_kernels(device, nvidias, triton=problem, int_mm="")[0]


def test_results_tell_of_slower_kernels_alone() -> None:
    assert NO_COMPILER in kernels_note(CUDA, "torch", NO_COMPILER)
    assert kernels_note(CUDA, "triton", "every kernel compiles") == ""
    assert kernels_note(CPU, "plain", "asked for") == kernels_note(CUDA, "plain", "") == ""


def test_a_loaded_model_carries_the_reason_of_its_kernels_into_the_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(loader, "choose_kernels", lambda device, capability: ("plain", NO_COMPILER))
    monkeypatch.setattr(loader, "kernels_note", lambda device, name, reason: f"{name}: {reason}")
    loaded = loader.load_transformers(Store(tmp_path), "miniature", "reference", CPU, torch.float32)
    assert loaded.kernels == "plain" and loaded.notes == (f"plain: {NO_COMPILER}",)


def test_kernels_that_do_not_exist_are_refused_with_those_that_do() -> None:
    with pytest.raises(RequestError, match="plain"):
        kernels("cutlass")


class Weights:
    """One random block in a storage."""

    def __init__(self, storage: str) -> None:
        self.tensors, self.storage = fused(random_tensors(BRANCH, seed=9, dtype=torch.float32)), storage

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        return self.tensors[name][rows or slice(None)]

    def stored(self, linear: str) -> tuple[Tensor | PackedWeight, ...]:
        return (self.packed(linear),)

    def packed(self, linear: str) -> Tensor | PackedWeight:
        weight = self.tensor(f"{linear}.weight")
        if "attention." not in linear and "feed_forward." not in linear:
            return weight
        if self.storage == "int8":
            return PackedWeight("int8", *int8.quantize_rows(weight))
        if self.storage == "rotated":
            return PackedWeight("convrot", *int8.quantize_rows(rotate(weight)), rotated=True)
        if self.storage == "Q4_K":
            return PackedWeight("gguf", k_quants.encode(weight, "Q4_K"), gguf_type="Q4_K")
        return weight


def velocity(storage: str, arithmetic: str, used: Kernels, device: torch.device = CPU) -> Tensor:
    """One block over 3 text tokens and 2 x 2 image tokens, in float32."""
    placement = Placement(torch.float32, device, device, used, arithmetic)
    backbone = assemble(Weights(storage), BRANCH, SETTINGS, placement, sees_text=True)
    generator = torch.Generator().manual_seed(1)
    features, latents = torch.randn(3, 130, generator=generator), torch.randn(4, 128, generator=generator)
    with torch.inference_mode():
        prepared = backbone.prepare(features.to(device), torch.tensor([0.3]), 2, 2)
        return backbone(latents.to(device), prepared, 0).cpu()


STORAGES = [("dense", ""), ("int8", ""), ("rotated", ""), ("Q4_K", "w4a16"), ("Q4_K", W4A8)]
SETS = [(name, *storage) for name in ("triton", "processor", "torch", "plain") for storage in STORAGES]
SETS.append(("int_mm", "rotated", ""))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "storage", "arithmetic"), SETS)
def test_every_set_of_kernels_draws_what_the_plain_ones_draw(name: str, storage: str, arithmetic: str) -> None:
    """Triton's run in its interpreter. One INT8 value on the edge between two moves a token by 1 / 127.5 of its largest
    in one of 256 channels: some 0.2 % of it."""
    if name in ("int_mm", "torch") and not cpu_multiplies_exactly():
        pytest.skip("torch._int_mm saturates on this CPU")
    truth = velocity(storage, arithmetic, PLAIN)
    bound = 1e-5 if storage == "dense" or arithmetic == "w4a16" else 5e-3
    assert relative_error(velocity(storage, arithmetic, kernels(name)), truth) < bound


@pytest.mark.gpu
@pytest.mark.parametrize(("storage", "arithmetic"), STORAGES)
def test_on_a_gpu_its_kernels_draw_what_the_plain_ones_draw(storage: str, arithmetic: str) -> None:
    name, _ = choose_kernels(CUDA, torch.cuda.get_device_capability())
    truth = velocity(storage, arithmetic, PLAIN)
    assert relative_error(velocity(storage, arithmetic, kernels(name), CUDA), truth) < 5e-3


@pytest.mark.slow
def test_compiled_kernels_draw_what_the_plain_ones_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiler's first stage alone: graphs are captured, for any number of tokens, and run as they are."""
    made = {name: torch.compile(getattr(PLAIN, name), dynamic=True, backend="eager") for name in BETWEEN_MATRICES}
    monkeypatch.setattr(choice.torch, "compile", lambda function, dynamic: made[function.__name__])
    used = compiled_kernels(PLAIN, CPU)
    assert used.name == "plain, compiled" and used.matmul is PLAIN.matmul
    for storage in ("dense", "rotated"):
        assert relative_error(velocity(storage, "", used), velocity(storage, "", PLAIN)) < 1e-5


def test_a_card_without_triton_is_told_that_nothing_compiles_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "usable_triton", lambda kind: NO_COMPILER)
    with pytest.raises(DeviceError, match="sudo apt install gcc"):
        compiled_kernels(PLAIN, CUDA)


def test_a_processor_without_a_compiler_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice.shutil, "which", lambda _: None)
    with pytest.raises(DeviceError, match=r"g\+\+"):
        compiled_kernels(PLAIN, CPU)


@pytest.mark.slow
def test_sets_that_need_no_triton_do_not_import_it() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from ideogram_app.kernels.choice import kernels\n"
        "print(kernels('torch').name, kernels('plain').name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["torch", "plain"]
