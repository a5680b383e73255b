"""The GPU benchmark without a GPU: every part and both plans at tiny size, and what its parts are made of."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

from rt.bench.gpu import command
from rt.bench.gpu_parts.apart import Processes
from rt.bench.gpu_parts.part import Context, choose
from rt.bench.gpu_parts.parts import PARTS, PLANS
from rt.bench.gpu_parts.record import Run, Status
from rt.bench.gpu_parts.run import run_parts
from rt.bench.gpu_parts.settings import PREPARED
from rt.bench.gpu_parts.table import render, sections
from rt.bench.stand_in_gpu.programs import PROGRAMS
from rt.errors import ConfigError

# importlib mode does not let a test import what lies beside it, and the process of a part is given this path.
sys.path.append(str(Path(__file__).parent))
from gpu_records import a_run, outcome

ROOT = Path(__file__).resolve().parents[2]
# What a test can afford at any time; the models trace, build and compile.
QUICK = ("ceilings", "fp8")
NAMES = [part.name for part in PARTS]


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(dry=True, scratch=tmp_path / "scratch", seed=7)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared, so that models of the same shapes are built once."""
    return tmp_path_factory.mktemp("gpu")


def test_both_ways_to_start_it_and_no_part_by_another_name(tmp_path: Path) -> None:
    for start in ([str(ROOT / "bench" / "gpu.py")], ["-m", "rt.bench.gpu"]):
        done = subprocess.run(
            [sys.executable, *start, "--dry", "--only", "ceiling"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        assert done.stderr.splitlines() == [
            f"Error: no part 'ceiling' (did you mean 'ceilings'?); there are: {', '.join(NAMES)}"
        ]
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = CliRunner().invoke(
        command, ["--out", str(tmp_path / "out"), "--scratch", str(tmp_path / "scratch")]
    )
    assert done.exit_code == 1
    assert (
        "Error: torch sees no GPU; go to a machine with one, or see that all runs with --dry" in done.output
    )
    assert not (tmp_path / "out").exists()


def test_every_part_fits_into_a_command_of_nine_minutes_after_what_it_needs() -> None:
    assert all(part.minutes <= 8.5 for part in PARTS)
    assert len(set(NAMES)) == len(NAMES)
    for part in PARTS:
        assert set(part.needs) <= set(NAMES[: NAMES.index(part.name)])


def test_a_part_that_is_wanted_runs_in_its_order() -> None:
    assert [part.name for part in choose(PARTS, ("fp8", "ceilings"))] == ["ceilings", "fp8"]
    assert [part.name for part in choose(PARTS, ("sd15",))] == ["build-sd15", "sd15"]
    with pytest.raises(ConfigError, match="did you mean 'kernels'"):
        choose(PARTS, ("kernal",))


@pytest.mark.slow
def test_a_dry_run_prints_tables_of_80_columns_and_writes_where_it_is_told(tmp_path: Path) -> None:
    arguments = ["--dry", *(f"--only={name}" for name in QUICK), "--scratch", str(tmp_path / "scratch")]
    done = CliRunner().invoke(command, [*arguments, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    printed, path = done.output.rstrip().rsplit("\n\n", 1)
    assert "no figure below means anything" in printed and "copy within the device" in printed
    assert max(map(len, printed.splitlines())) <= 80
    record = json.loads(Path(path).read_text())
    assert set(record) == {"schema", "provenance", "gpu", "seed", "parts"}
    assert {name: part["status"] for name, part in record["parts"].items()} == dict.fromkeys(QUICK, "done")
    assert set(record["parts"]["fp8"]) == {"status", "reason", "seconds", "date", "commit", "figures"}
    assert json.loads(json.dumps(Run.from_json(record).to_json())) == record
    assert render([record]) == "not measured yet"

    again = CliRunner().invoke(command, [*arguments, "--out", str(tmp_path / "out"), "--resume"])
    assert again.output.count("kept, measured") == 2
    assert json.loads(Path(path).read_text()) == record


def test_a_record_that_lies_in_the_tree_goes_on_where_it_is_told_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(ceilings=outcome(copy_tb_s=1.0))
    run.save(tmp_path / "tree")
    monkeypatch.setattr("rt.bench.gpu.RESULTS", tmp_path / "tree")
    arguments = ["--dry", "--only", "ceilings", "--resume", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(command, [*arguments, "--scratch", str(tmp_path / "scratch")])
    assert done.exit_code == 0, done.output
    assert "ceilings: kept, measured 2020-01-01" in done.output
    assert Run.from_json(json.loads((tmp_path / "out" / f"{run.stem}.json").read_text())) == run


@pytest.mark.slow
def test_a_dry_run_leaves_no_record_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(command, ["--dry", "--only", "ceilings"])
    assert done.exit_code == 0, done.output
    assert not list(tmp_path.rglob("*.json"))


def check_figures(name: str, figures: Any) -> None:
    """Each part's figures make a table in which nothing is missing, and a document of it."""
    section = next(sections({name: outcome(**figures)}))
    assert section.rows and all(len(row) == len(section.head) for row in section.rows)
    assert max(map(len, section.text().splitlines())) <= 80
    for row in [
        *figures.get("cases", []),
        *figures.get("workloads", []),
        *figures.get("payloads", []),
        *figures.get("pictures", []),
        *figures.get("outcomes", []),
    ]:
        assert row["passed"], row


@pytest.mark.parametrize("name", [name for name in NAMES if name in (*QUICK, "payloads")])
def test_every_small_part_runs_dry(name: str, context: Context) -> None:
    [part] = choose(PARTS, (name,))
    *_, figures = part.run(context)
    json.dumps(figures)
    check_figures(name, figures)


def dry(plan: str, scratch: Path, *options: str) -> Run:
    """The record of a dry run of a plan."""
    out = scratch / plan
    arguments = ["--dry", "--plan", plan, "--scratch", str(scratch), "--out", str(out), *options]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # where the demo model is
        done = CliRunner().invoke(command, arguments)
    assert done.exit_code == 0, done.output
    [path] = out.glob("*.json")
    assert path.with_suffix(".log").is_file() and len(list(out.iterdir())) == 2
    return Run.from_json(json.loads(path.read_text()))


@pytest.fixture(scope="module")
def planned(scratch: Path) -> Run:
    """Both plans of the first minutes; the second finds what the first has compiled."""
    run = dry("first", scratch, "--minutes", "60")
    return replace(run, parts={**run.parts, **dry("second", scratch, "--minutes", "60").parts})


PLANNED = [name for plan in ("first", "second") for name in PLANS[plan].parts]
AS_SD15 = ("build-sd21", "sd21")  # at the size of a dry run; only sides and widths tell them apart
LARGE = [name for name in NAMES if name not in (*QUICK, *PLANNED, "payloads", *AS_SD15)]


@pytest.fixture(scope="module")
def large(scratch: Path, speed: Any) -> Run:
    """All large parts that no plan above has, those of one environment after the other: each imports torch once."""
    parts = sorted(choose(PARTS, LARGE), key=lambda part: [*part.dry_environment])
    with pytest.MonkeyPatch.context() as patch, Processes() as processes:
        patch.chdir(ROOT)
        return run_parts(
            parts,
            Context(dry=True, scratch=scratch, seed=7),
            a_run(),
            processes=processes,
            minutes=14 * speed.slowness(),
            log=scratch / "large.log",
            keep=lambda run: None,
            say=lambda line: None,
        )


def check_part(name: str, run: Run) -> None:
    """It is done, and its figures are right."""
    assert run.parts[name].status is Status.DONE, run.parts[name]
    figures = run.parts[name].figures
    check_figures(name, figures)
    for row in figures.get("candidates", {}).values():
        assert all(error < 1e-4 for error in row.get("errors", {}).values()), row


@pytest.mark.slow
@pytest.mark.timeout(900)  # the first waits for all
@pytest.mark.parametrize("name", PLANNED)
def test_the_plans_run_dry(name: str, planned: Run) -> None:
    check_part(name, planned)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", LARGE)
def test_every_large_part_runs_dry(name: str, large: Run) -> None:
    check_part(name, large)


def test_plans_fit_into_their_minutes_and_have_what_their_parts_need() -> None:
    minutes = {part.name: part.minutes for part in PARTS}
    for plan in PLANS.values():
        if plan.name != "all":  # which has as much as fits
            assert sum(minutes[name] for name in plan.parts) <= plan.minutes
        for index, name in enumerate(plan.parts):
            [part] = [part for part in PARTS if part.name == name]
            assert set(part.needs) <= set(plan.parts[:index])
    assert {name for plan in PLANS.values() for name in plan.parts} == set(NAMES)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--plan", "first", "--only", "fp8"], "--plan says which parts, and so does --only"),
        (["--plan", "third"], "'third' is not one of 'first', 'second', 'all'"),
        (["--packages", "nowhere"], "'nowhere' does not exist"),
    ],
)
def test_options_that_make_no_sense_end_it_at_once(options: list[str], said: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(command, ["--dry", "--out", str(tmp_path / "out"), *options])
    assert done.exit_code != 0 and said in done.output
    assert not list(tmp_path.iterdir())


def test_packages_are_prepared_by_the_stand_in_and_nothing_else_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(folder: Path, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        yield from ({"program": f"{folder.name}/{name}", "launches": 611} for name in names)

    stand_in = ModuleType("stand_in_gpu.packages")
    stand_in.prepare = prepare  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rt.bench.stand_in_gpu", ModuleType("stand_in_gpu"))
    monkeypatch.setitem(sys.modules, "rt.bench.stand_in_gpu.packages", stand_in)
    done = CliRunner().invoke(command, ["--prepare", str(tmp_path / "packages")])
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.output.splitlines()]
    assert lines == [{"program": f"packages/{name}", "launches": 611} for name in PREPARED]
    assert {*PREPARED} <= PROGRAMS.keys()


def test_small_inputs_are_many_and_marked_where_they_stay_in_the_cache() -> None:
    pytest.importorskip("triton")
    from rt.bench.gpu_parts.timings import sets_of

    cache = 50 * 2**20
    assert sets_of(10 * cache, cache) == (1, False)
    assert sets_of(2**20, cache) == (100, False)
    assert sets_of(3 * 2**20, cache) == (34, False)  # more than twice as large
    count, cached = sets_of(2**10, cache)
    assert cached and count * 2**10 < 2 * cache


def test_a_list_of_kernels_that_was_broken_off_is_not_begun_anew(context: Context) -> None:
    pytest.importorskip("triton")
    from rt.bench.gpu_parts import kernels, timings
    from rt.kernels.registry import NAMES as KERNELS

    cases = [{"kernel": name} for name in KERNELS]
    rows = [{"kernel": name, "workload": "smallest case"} for name in KERNELS]
    before = replace(context, before={"cases": cases, "workloads": rows})
    assert list(kernels.run(before)) == [{"cases": cases}]
    assert list(timings.run(before)) == [{"workloads": rows, "left_out": []}]


def test_the_chosen_workloads_are_there() -> None:
    pytest.importorskip("triton")
    from rt.bench.gpu_parts.settings import CHOSEN
    from rt.kernels import registry

    assert len(CHOSEN) == 12
    assert all(workload in registry.spec(kernel).workloads for kernel, workload in CHOSEN)


def test_a_package_that_is_none_or_for_another_gpu_is_refused(tmp_path: Path) -> None:
    import torch
    from torch.export.pt2_archive._package import package_pt2

    from rt.backends.inductor import ABOUT, About
    from rt.bench.gpu_parts.package import INPUTS, Package
    from rt.bench.gpu_parts.place import Place
    from rt.errors import CheckpointError, IncompatibleBundleError

    place = Place(torch.device("cpu"))
    with pytest.raises(CheckpointError, match=r"is no package: it needs one engines/\*.pt2 and inputs.json"):
        Package(tmp_path, place, 7)
    about = About(
        torch=torch.__version__, machine="", instructions=(), capability=90, file="weights", weights={}
    )
    (tmp_path / "engines").mkdir()
    package_pt2(str(tmp_path / "engines" / "unet.pt2"), extra_files={ABOUT: about.to_json()})
    (tmp_path / INPUTS).write_text('{"inputs": []}')
    with pytest.raises(IncompatibleBundleError, match="for compute capability 90, and this GPU has 0"):
        Package(tmp_path, place, 7)


def test_jobs_of_a_build_travel_to_other_processes_and_are_all_of_a_bundle(tmp_path: Path) -> None:
    import torch

    from rt.bench.gpu_parts import bare
    from rt.bench.gpu_parts.model import Model
    from rt.bench.gpu_parts.place import Place
    from rt.bench.gpu_parts.settings import SETTINGS
    from rt.config import BuildConfig

    model = Model(setting=SETTINGS["sdxl"].tiny(), place=Place(torch.device("cpu")), seed=7)
    for backend, loop in (("openvino", 0), ("inductor", 1)):
        config = BuildConfig(profiles=(model.profile,), backend=backend)
        found = bare.jobs(model.checkpoint, config, tmp_path, guided=True)
        assert pickle.loads(pickle.dumps(found[0])).programs == found[0].programs
        programs = [component.value for job in found for component in job.programs]
        assert programs == [
            "unet",
            "vae_decoder",
            "unet_time",
            "unet_context",
            "text_encoder",
            "text_encoder_2",
        ]
        assert sum(not job.programs for job in found) == loop


def test_diffusers_tries_convolutions_out_and_nobody_else_does() -> None:
    import torch

    from rt.bench.gpu_parts.eager import Eager
    from rt.bench.gpu_parts.model import Model
    from rt.bench.gpu_parts.place import Place
    from rt.bench.gpu_parts.settings import SETTINGS

    peer = Eager(Model(setting=SETTINGS["sd15"].tiny(), place=Place(torch.device("cpu")), seed=7))
    seen: list[bool] = []
    forward = peer.pipeline.unet.forward
    peer.pipeline.unet.forward = lambda *rest, **more: (
        seen.append(torch.backends.cudnn.benchmark) or forward(*rest, **more)
    )
    peer.unet()
    assert seen == [True] and not torch.backends.cudnn.benchmark


@pytest.mark.slow
def test_our_loop_and_the_ways_of_launching_it_stand_on_a_device(
    scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside what a dry run does: the same on the stand-in for a GPU, whose kernels are their references."""
    pytest.importorskip("triton")
    import torch

    from rt.bench.gpu_parts import ablation, bundles, ours
    from rt.bench.gpu_parts.model import Model
    from rt.bench.gpu_parts.place import Place
    from rt.bench.gpu_parts.settings import SETTINGS

    from ..rt.device_fakes import DeviceEngines, host_device, library

    place = Place(torch.device("cpu"))
    list(bundles.run(Context(dry=True, scratch=scratch, seed=7), "sd15"))
    peer = ours.Ours(Model(setting=SETTINGS["sd15"].tiny(), place=place, seed=7), scratch)
    device = host_device()
    engines: Any = DeviceEngines(peer.pipe.engines.get, device)
    monkeypatch.setattr(peer.pipe, "engines", engines)
    monkeypatch.setattr(ours, "KernelLibrary", lambda device, *_: library(device, tmp_path))
    peer._fill(peer.model.inputs.timestep)
    graphs = {}
    for name, run in peer.loops(3).items():
        device.calls = []
        run()
        graphs[name] = [call.name for call in device.calls].count("graph")
    assert graphs == {"step": 3, "loop": 1}
    assert list(ablation._launching(peer)) == ["no graph", "a graph a step", "one graph of all steps"]


def test_a_model_without_its_bundle_says_what_to_do(context: Context) -> None:
    [_, part] = choose(PARTS, ("sd15",))
    with pytest.raises(ConfigError, match="run the part that builds it first, with the same --scratch"):
        next(part.run(context))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_the_step_of_diffusers_gets_timesteps_of_its_schedulers_type(tmp_path: Path) -> None:
    """Or a compiler would compile it twice: for the step that is timed, and for the loop."""
    import torch

    from rt.bench.gpu_parts.eager import Eager
    from rt.bench.gpu_parts.model import Model
    from rt.bench.gpu_parts.place import Place
    from rt.bench.gpu_parts.settings import SETTINGS

    for name, kind in (("sd15", torch.int64), ("sdxl-turbo", torch.float32)):
        model = Model(setting=SETTINGS[name].tiny(), place=Place(torch.device("cpu")), seed=7)
        peer = Eager(model)
        asked = []
        forward = peer.pipeline.unet.forward
        peer.pipeline.unet.forward = lambda latents, t, *rest, f=forward, a=asked, **more: (
            a.append(t.dtype) or f(latents, t, *rest, **more)
        )
        peer.unet()
        peer.picture(1)
        assert asked == [kind, kind]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", ["sd15", "sdxl-turbo"])
def test_diffusers_draws_from_the_states_that_the_model_was_made_for(name: str) -> None:
    import torch

    from rt.bench.gpu_parts.eager import Eager
    from rt.bench.gpu_parts.model import Model
    from rt.bench.gpu_parts.place import Place
    from rt.bench.gpu_parts.settings import SETTINGS

    model = Model(setting=SETTINGS[name].tiny(), place=Place(torch.device("cpu")), seed=7)
    peer = Eager(model, torch.float32)
    given: list[torch.Tensor] = []
    forward = peer.pipeline.unet.forward
    peer.pipeline.unet.forward = lambda *rest, **more: (
        given.append(more["encoder_hidden_states"]) or forward(*rest, **more)
    )
    peer.picture(1)
    expected = []
    for encoder, tokens in model.inputs.tokens.items():
        output = model.checkpoint.load(encoder)(tokens, output_hidden_states=True)
        expected.append(output.last_hidden_state if name == "sd15" else output.hidden_states[-2])
    torch.testing.assert_close(given[0], torch.cat(expected, dim=-1))


def test_the_fused_step_runs_kernels_in_the_place_of_every_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from rt.bench.gpu_parts import ablation
    from rt.export.operators import ops

    asked = []
    stand_ins = {
        operator: lambda x, *rest, name=str(operator): asked.append(name) or x
        for operator in ablation._KERNELS
    }
    monkeypatch.setattr(ablation, "_KERNELS", stand_ins)
    x = torch.ones(1, 4, 8)
    with ablation._Kernels():
        ops.attention.default(x, x, x, 2)
        ops.group_norm.default(x, torch.ones(8), torch.zeros(8), 2, 1e-5, True)
        ops.geglu.default(x)
    assert asked == ["rt.attention.default", "rt.group_norm.default", "rt.geglu.default"]
