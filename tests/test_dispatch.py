# SPDX-License-Identifier: Apache-2.0
"""Which backend runs, and what is said when one can't."""

from __future__ import annotations

import asyncio
import contextlib
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support import example, run_python

import grcsf_kernels
from grcsf_kernels import dispatch, doctor

_ROOT = Path(__file__).parents[1]


def test_backends_says_which_there_are_and_why_others_are_not():
    found = grcsf_kernels.backends()
    assert list(found) == ["reference", "cpu", "triton", "cuda"]
    assert found["reference"].operators == ("residual_map", "gcu", "rcu")
    for name, status in found.items():
        assert bool(status) == status.available == (not status.reason), name
        assert status.reason or status.operators, name


def test_the_native_kernels_are_built_here():
    """The test suite is of the built package: without `_C` most of it would test nothing."""
    assert "residual_map" in grcsf_kernels.backends()["cpu"].operators


@pytest.fixture
def calls(monkeypatch):
    """The backends that ran, in order."""
    ran = []
    original = dispatch.select

    def select(operator, device_type, data=None):
        ran.append(original(operator, device_type, data))
        return ran[-1]

    monkeypatch.setattr(dispatch, "select", select)
    return ran


def test_automatic_choice_prefers_native_kernels(calls):
    example("residual_map")()
    assert calls == ["cpu"]


def test_use_backend_nests_and_ends(calls):
    call = example("residual_map")
    with grcsf_kernels.use_backend("reference"):
        call()
        with grcsf_kernels.use_backend("cpu"):
            call()
        call()
    call()
    assert calls == ["reference", "cpu", "reference", "cpu"]


def test_use_backend_holds_for_backward_too(calls):
    call = example("residual_map").requires_grad()
    with grcsf_kernels.use_backend("reference"):
        call()[0].sum().backward()
    assert calls == ["reference", "reference"]


def _overlap(*blocks):
    """Run generators, each on a thread of its own, in turns until all have ended."""
    with contextlib.ExitStack() as stack:
        threads = [stack.enter_context(ThreadPoolExecutor(1)) for _ in blocks]
        while True:
            ended = [t.submit(next, b, "ended") for t, b in zip(threads, blocks, strict=True)]
            if all(f.result() == "ended" for f in ended):
                return


def test_blocks_of_threads_that_overlap_hold_each_for_its_own_thread():
    """The one that began first ends first: what is taken off is its own choice."""
    seen = {}

    def block(name, before, inside, after):
        for _ in range(before):
            yield
        with grcsf_kernels.use_backend(name):
            seen[name] = []
            for _ in range(inside):
                seen[name].append(dispatch.select("gcu", "cpu"))
                yield
        for _ in range(after):
            seen[f"after {name}"] = dispatch.select("gcu", "cpu")
            yield

    _overlap(block("reference", 0, 4, 5), block("cpu", 2, 5, 2))
    assert seen["reference"] == ["reference"] * 4 and seen["cpu"] == ["cpu"] * 5
    assert seen["after reference"] == seen["after cpu"] == "cpu"
    assert dispatch.asked() is None


def test_a_thread_without_a_block_takes_the_block_of_the_process():
    with ThreadPoolExecutor(1) as thread:
        with grcsf_kernels.use_backend("reference"):
            assert thread.submit(dispatch.select, "gcu", "cpu").result() == "reference"
        assert thread.submit(dispatch.select, "gcu", "cpu").result() == "cpu"


def test_a_backward_on_another_thread_runs_on_the_backend_of_its_forward(calls):
    """As autograd does for CUDA tensors, here with another block open on the other thread."""

    def forward():
        with grcsf_kernels.use_backend("reference"):
            return example("gcu").requires_grad()()[0].sum()

    def backward(output):
        with grcsf_kernels.use_backend("cpu"):
            output.backward()
            example("gcu")()

    with ThreadPoolExecutor(1) as thread:
        thread.submit(backward, forward()).result()
    forward().backward()
    expected = ["reference", "reference", "cpu", "reference", "reference"]
    assert calls == expected and dispatch.asked() is None


def test_a_block_ends_with_an_exception_a_generator_and_a_task():
    def generator():
        with grcsf_kernels.use_backend("reference"):
            yield dispatch.select("gcu", "cpu")

    with contextlib.suppress(KeyError), grcsf_kernels.use_backend("reference"):
        raise KeyError
    assert dispatch.asked() is None

    opened = generator()
    assert next(opened) == "reference"
    with ThreadPoolExecutor(1) as thread:  # where garbage is collected, nobody knows
        thread.submit(opened.close).result()
    assert dispatch.asked() is None and dispatch.select("gcu", "cpu") == "cpu"

    async def task(name, turns):
        with grcsf_kernels.use_backend(name):
            for _ in range(turns):
                await asyncio.sleep(0)
                assert dispatch.select("gcu", "cpu") == name

    async def tasks():
        await asyncio.gather(task("reference", 2), task("cpu", 4), task("reference", 3))

    asyncio.run(tasks())
    assert dispatch.asked() is None


def test_a_choice_inside_a_compiled_function_is_refused_or_holds(calls):
    case = example("residual_map")

    def call(*arguments):
        with grcsf_kernels.use_backend("reference"):
            return case.function(*arguments, **case.options)

    # Older versions of torch name the function instead.
    expected = "choice would not hold|skip function use_backend"
    with pytest.raises(torch._dynamo.exc.Unsupported, match=expected):
        torch.compile(call, backend="aot_eager", fullgraph=True)(*case.arguments)
    assert not calls
    torch.compile(call, backend="aot_eager")(*case.arguments)
    assert calls == ["reference"]
    inner = torch.compile(case.function, backend="aot_eager", fullgraph=True)
    with grcsf_kernels.use_backend("reference"):
        inner(*case.arguments, **case.options)
    assert calls[-1] == "reference"
    inner(*case.arguments, **case.options)
    assert calls[-1] == "cpu"


def test_the_environment_variable(calls, monkeypatch):
    monkeypatch.setenv("GRCSF_BACKEND", "reference")
    example("residual_map")()
    with grcsf_kernels.use_backend("cpu"):
        example("residual_map")()
    assert calls == ["reference", "cpu"]
    monkeypatch.setenv("GRCSF_BACKEND", "fast")
    with pytest.raises(ValueError, match="GRCSF_BACKEND names backend 'fast', expected one of ref"):
        example("residual_map")()


def test_an_explicit_choice_never_falls_back():
    missing = next(name for name, status in grcsf_kernels.backends().items() if not status)
    with (
        pytest.raises(RuntimeError, match=f"backend '{missing}' can't run here: .+"),
        grcsf_kernels.use_backend(missing),
    ):
        pass
    with (
        pytest.raises(ValueError, match="use_backend names backend 'fpga'"),
        grcsf_kernels.use_backend("fpga"),
    ):
        pass
    absent = [op for op in dispatch.OPERATORS if dispatch.why_not("cpu", op, "cpu")]
    for operator in absent:
        with (
            grcsf_kernels.use_backend("cpu"),
            pytest.raises(RuntimeError, match=f"{operator}: backend 'cpu' was asked for, but"),
        ):
            example(operator)()


def test_the_emulation_is_for_tests_alone():
    assert dispatch.EMULATED not in grcsf_kernels.backends()
    with (
        pytest.raises(RuntimeError, match=r"'cuda-emulated' can't run here: .*\(make emulate\)"),
        grcsf_kernels.use_backend(dispatch.EMULATED),
    ):
        pass


def test_a_backend_is_for_its_own_device():
    assert "runs on cpu tensors, and these are on cuda" in dispatch.why_not(
        "cpu", "residual_map", "cuda"
    )


def test_triton_is_taken_where_it_was_measured_to_be_faster(monkeypatch):
    row = {"operator": "gcu", "dtype": "bfloat16", "voxels": [64, 128], "source": "a folder"}
    monkeypatch.setattr(dispatch, "measured_preferences", lambda: (row,))
    monkeypatch.setattr(dispatch, "why_not", lambda backend, *args: "")

    def chosen(operator, dtype, *space):
        data = torch.empty(2, 3, *space, dtype=dtype)
        return dispatch.select(operator, "cuda", data)

    assert chosen("gcu", torch.bfloat16, 4, 4, 4) == "triton"
    assert chosen("gcu", torch.bfloat16, 4, 4, 8) == "cuda"
    assert chosen("gcu", torch.float16, 4, 4, 4) == "cuda"
    assert chosen("rcu", torch.bfloat16, 4, 4, 4) == "cuda"
    assert dispatch.select("gcu", "cuda") == "cuda"


def test_every_measured_preference_has_its_source():
    for row in dispatch.measured_preferences():
        assert (_ROOT / row["source"]).is_dir(), row
        assert row["operator"] in dispatch.OPERATORS and row["voxels"][0] < row["voxels"][1]


def test_falling_back_is_said_once(monkeypatch):
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(dispatch, "why_not", lambda backend, *args: "it is switched off")
    with pytest.warns(RuntimeWarning, match=r"gcu on cpu .* \(cpu: it is switched off\)") as said:
        assert dispatch.select("gcu", "cpu") == "reference"
        assert dispatch.select("gcu", "cpu") == "reference"
        assert dispatch.select("rcu", "cpu") == "reference"
    assert len(said) == 2


def test_doctor_names_every_backend_and_operator(capsys):
    assert doctor.main() == 0
    printed = capsys.readouterr().out
    for word in (*dispatch.BACKENDS, *dispatch.OPERATORS, torch.__version__, "instruction set"):
        assert word in printed
    for name, status in grcsf_kernels.backends().items():
        if not status:
            assert re.search(rf"{name} +not available: {re.escape(status.reason)}", printed)


def test_importing_needs_neither_triton_nor_the_train_extra():
    """Nothing heavy is imported behind the user's back."""
    result = run_python(
        "import sys, grcsf_kernels, grcsf_kernels.nn, grcsf_kernels.models\n"
        "heavy = {'triton', 'monai', 'nibabel', 'typer', 'rich', 'matplotlib'}\n"
        "loaded = heavy & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    assert result.returncode == 0, result.stderr


def test_works_without_the_native_module():
    """A pure Python installation: imports, falls back with a reason, and doctor says it."""
    result = run_python(
        "import sys, warnings\n"
        "sys.modules['grcsf_kernels._C'] = None\n"
        "import torch, grcsf_kernels\n"
        "from grcsf_kernels import doctor\n"
        "assert not grcsf_kernels.backends()['cpu']\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always')\n"
        "    image = torch.ones(1, 1, 4, 4)\n"
        "    found = grcsf_kernels.residual_map(image, torch.zeros(1, 1, 4, 4), patch_size=2)\n"
        "assert torch.equal(found, image)\n"
        "assert any('reference backend' in str(w.message) for w in said), said\n"
        "print(doctor.report())"
    )
    assert result.returncode == 0, result.stderr
    assert "_C         missing: grcsf_kernels._C can't be imported" in result.stdout
