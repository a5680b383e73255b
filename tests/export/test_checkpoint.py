from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from huggingface_hub import errors
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from rt.errors import CheckpointError, ConfigError, PickleError
from rt.export import hub
from rt.export.checkpoint import Checkpoint, open_checkpoint
from rt.export.facts import read_spec
from rt.export.source import Kind
from rt.export.weights import read_header
from rt.model import Component, Family

REFERENCES = {
    Component.TEXT_ENCODER: (CLIPTextModel, "text_encoder"),
    Component.TEXT_ENCODER_2: (CLIPTextModelWithProjection, "text_encoder_2"),
    Component.UNET: (UNet2DConditionModel, "unet"),
    Component.VAE_ENCODER: (AutoencoderKL, "vae"),
    Component.VAE_DECODER: (AutoencoderKL, "vae"),
}
UNET = Path("unet") / "diffusion_pytorch_model.safetensors"
VAE = Path("vae") / "diffusion_pytorch_model.safetensors"
TEXT = Path("text_encoder") / "model.safetensors"
COMMIT = "0123456789abcdef0123456789abcdef01234567"

Folder = Callable[..., Path]
Edit = Callable[..., None]


def assert_same_as_libraries(checkpoint: Checkpoint, root: Path) -> None:
    for component in checkpoint.components:
        reference_class, subfolder = REFERENCES[component]
        reference = reference_class.from_pretrained(root, subfolder=subfolder, torch_dtype=torch.float32)
        module = checkpoint.load(component)
        assert type(module) is reference_class
        assert not module.training
        expected, state = reference.state_dict(), module.state_dict()
        assert list(state) == list(expected)
        for parameter in module.parameters():
            assert parameter.dtype == torch.float32 and not parameter.requires_grad
        for name in expected:
            assert torch.equal(state[name], expected[name]), f"{component.value}: {name} differs"


def refused(model: Path | str, **options: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(model), **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


# What is read.


@pytest.mark.parametrize("family", Family)
def test_folder_equals_libraries(folder: Folder, family: Family) -> None:
    root = folder(family)
    checkpoint = open_checkpoint(str(root))
    assert checkpoint.kind is Kind.FOLDER
    assert checkpoint.spec.family is family
    assert_same_as_libraries(checkpoint, root)


def test_demo_equals_libraries(demo: Path) -> None:
    checkpoint = open_checkpoint(str(demo))
    assert_same_as_libraries(checkpoint, demo)
    spec = checkpoint.spec
    assert (spec.vae_scale_factor, spec.sample_size, spec.max_tokens, spec.context_size) == (4, 16, 16, 192)
    assert spec.scaling_factor == 1.0
    assert spec.scheduler["prediction_type"] == "v_prediction"
    assert checkpoint.licence == "LICENSE.md"
    assert checkpoint.tokenizer(Component.TEXT_ENCODER)("a red heart").ids.shape == (16,)
    assert "configs=" not in repr(checkpoint)


def test_demo_s_inpainting_equals_libraries(demo: Path) -> None:
    """Nine channels, matrices in float8, and links to what it shares with the demo model."""
    root = demo.with_name("emoji-ldm-inpainting")
    assert {path.name for path in root.iterdir() if not path.is_symlink()} == {"model_index.json", "unet"}
    checkpoint = open_checkpoint(str(root))
    assert_same_as_libraries(checkpoint, root)
    assert checkpoint.spec.inpainting
    stored = {tensor.dtype for tensor in checkpoint.source.headers(Component.UNET).values()}
    assert stored == {torch.float8_e4m3fn, torch.float16}
    assert checkpoint.licence == open_checkpoint(str(demo)).licence


def test_spec_of_sdxl(folder: Folder, edit_json: Edit) -> None:
    root = folder(Family.SDXL)
    spec = open_checkpoint(str(root)).spec
    assert spec.text_encoders == (Component.TEXT_ENCODER, Component.TEXT_ENCODER_2)
    assert (spec.context_size, spec.pooled_size, spec.vae_scale_factor, spec.sample_size) == (192, 96, 2, 8)
    assert spec.zero_negative
    edit_json(root / "model_index.json", force_zeros_for_empty_prompt=False)
    assert not open_checkpoint(str(root)).spec.zero_negative


def test_files_are_those_that_shape_the_result(folder: Folder) -> None:
    root = folder()
    (root / "README.md").write_text("---\nlanguage: en\nlicense: openrail\n---\nlicense: none")
    (root / "safety_checker").mkdir()
    (root / "safety_checker" / "model.safetensors").write_bytes(b"not read")
    checkpoint = open_checkpoint(str(root))
    assert checkpoint.licence == "openrail"
    assert sorted(checkpoint.files) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert all(path.is_file() for path in checkpoint.files.values())


def test_text_encoder_with_and_without_prefix(folder: Folder, edit_weights: Edit) -> None:
    root = folder()
    expected = open_checkpoint(str(root)).load(Component.TEXT_ENCODER).state_dict()

    def add_prefix(state: dict[str, torch.Tensor]) -> None:
        for name in [*state]:
            state[f"text_model.{name.removeprefix('text_model.')}"] = state.pop(name)
        state["text_model.embeddings.position_ids"] = torch.arange(12).unsqueeze(0)

    edit_weights(root / TEXT, add_prefix)
    state = open_checkpoint(str(root)).load(Component.TEXT_ENCODER).state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_old_names_of_vae_attention(folder: Folder, edit_weights: Edit) -> None:
    root = folder()
    expected = open_checkpoint(str(root)).load(Component.VAE_DECODER).state_dict()
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    renamed = 0

    def rename(state: dict[str, torch.Tensor]) -> None:
        nonlocal renamed
        for name in [*state]:
            for new_piece, old_piece in old.items():
                if new_piece in name:
                    state[name.replace(new_piece, old_piece)] = state.pop(name)
                    renamed += 1

    edit_weights(root / VAE, rename)
    assert renamed == 16
    state = open_checkpoint(str(root)).load(Component.VAE_DECODER).state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64])
def test_other_precisions_become_float32(folder: Folder, edit_weights: Edit, dtype: torch.dtype) -> None:
    root = folder()
    stored = {name: tensor.to(dtype) for name, tensor in load_file(root / UNET).items()}
    edit_weights(root / UNET, lambda state: state.update(stored))
    state = open_checkpoint(str(root)).load(Component.UNET).state_dict()
    assert all(torch.equal(state[name], stored[name].float()) for name in stored)


def test_sharded_weights(folder: Folder) -> None:
    root = folder()
    state = load_file(root / UNET)
    (root / UNET).unlink()
    shards = [f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    weight_map = {name: shards[i % 2] for i, name in enumerate(state)}
    for shard in shards:
        part = {name: tensor for name, tensor in state.items() if weight_map[name] == shard}
        save_file(part, root / "unet" / shard, metadata={"format": "pt"})
    index = root / "unet" / f"{UNET.name}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    checkpoint = open_checkpoint(str(root))
    assert {f"unet/{shard}" for shard in shards} <= checkpoint.files.keys()
    assert_same_as_libraries(checkpoint, root)

    shutil.copy(root / "unet" / shards[0], root / "unet" / shards[1])
    assert "in another shard, too" in refused(root)
    (root / "unet" / shards[1]).unlink()
    assert f"{shards[1]} is missing" in refused(root)
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../../outside.safetensors"}}))
    assert "not a file beside it" in refused(root)
    index.write_text(json.dumps({"weight_map": ["conv_in.weight"]}))
    assert "no `weight_map`" in refused(root)


def test_variants(folder: Folder, edit_weights: Edit, caplog: pytest.LogCaptureFixture) -> None:
    root = folder()
    for path in (UNET, VAE, TEXT):
        other = root / path.with_suffix(".fp16.safetensors")
        shutil.copy(root / path, other)
        edit_weights(other, lambda state: state.update({name: state[name] * 2 for name in state}))

    def conv_in(**options: str) -> torch.Tensor:
        return open_checkpoint(str(root), **options).load(Component.UNET).state_dict()["conv_in.weight"]

    plain = load_file(root / UNET)["conv_in.weight"]
    assert torch.equal(conv_in(), plain)
    assert torch.equal(conv_in(variant="fp16"), 2 * plain)
    assert "no variant 'bf16'; --variant can be one of: " in refused(root, variant="bf16")
    (root / VAE.with_suffix(".fp16.safetensors")).unlink()
    assert torch.equal(conv_in(variant="fp16"), 2 * plain)
    assert "vae has no variant 'fp16': its plain weights are taken" in caplog.text
    assert "text_encoder" not in caplog.text
    (root / VAE).rename(root / VAE.with_suffix(".ema.safetensors"))
    message = "vae has neither the variant 'fp16' nor plain weights; --variant can be one of: ema"
    assert refused(root, variant="fp16").endswith(message)
    (root / UNET).unlink()
    assert torch.equal(conv_in(), 2 * plain)  # the only one there
    shutil.copy(root / UNET.with_suffix(".fp16.safetensors"), root / UNET.with_suffix(".ema.safetensors"))
    assert refused(root).endswith("no plain weights; --variant can be one of: ema, fp16")


@pytest.mark.parametrize("shard", ["{stem}-0000{i}-of-00002.fp16", "{stem}.fp16-0000{i}-of-00002"])
def test_a_variant_in_shards(folder: Folder, shard: str) -> None:
    """One component has it, as diffusers or transformers names shards; the others have plain weights alone."""
    root = folder()
    state = load_file(root / UNET)
    names = [shard.format(stem=UNET.stem, i=i) + ".safetensors" for i in (1, 2)]
    weight_map = {name: names[i % 2] for i, name in enumerate(state)}
    for name in names:
        part = {key: 2 * tensor for key, tensor in state.items() if weight_map[key] == name}
        save_file(part, root / "unet" / name, metadata={"format": "pt"})
    index = root / "unet" / f"{UNET.name}.index.fp16.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = open_checkpoint(str(root), variant="fp16")
    assert {f"unet/{name}" for name in names} <= checkpoint.files.keys()
    loaded = checkpoint.load(Component.UNET).state_dict()
    assert torch.equal(loaded["conv_in.weight"], 2 * state["conv_in.weight"])


def test_prediction_type_can_be_corrected(folder: Folder) -> None:
    root = str(folder())
    assert open_checkpoint(root).spec.scheduler["prediction_type"] == "epsilon"
    checkpoint = open_checkpoint(root, prediction_type="v_prediction")
    assert checkpoint.spec.scheduler["prediction_type"] == "v_prediction"
    assert checkpoint.configs["scheduler"]["prediction_type"] == "v_prediction"
    with pytest.raises(ConfigError, match=r"did you mean 'v_prediction'\?.*epsilon, v_prediction, sample"):
        open_checkpoint(root, prediction_type="v-prediction")


# What is refused: arguments and paths.


@pytest.mark.parametrize("option", ["revision", "tokenizer"])
def test_options_of_other_kinds(folder: Folder, option: str) -> None:
    with pytest.raises(ConfigError, match=rf"{option} 'x' has no meaning for a folder, only for a"):
        open_checkpoint(str(folder()), **{option: "x"})  # type: ignore[arg-type]


def test_missing_path(tmp_path: Path) -> None:
    assert "does not exist: expected a diffusers folder" in refused(tmp_path / "absent")
    assert "does not exist" in refused("absent/model.safetensors")


def test_other_file(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    assert "is not a model" in refused(tmp_path / "model.onnx")


@pytest.mark.parametrize("name", ["pipe", "pipe.safetensors"])
def test_a_pipe_is_no_model(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / name)
    assert "is not a model: expected" in refused(tmp_path / name)
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(CheckpointError, match="is not a model: expected"):  # though a hub id looks like this
        open_checkpoint(f"{tmp_path.name}/{name}")


@pytest.mark.parametrize("name", ["x" * 300, f"{'x' * 300}.safetensors", "a\0b"])
def test_a_name_that_no_file_can_have(name: str) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(name)


@pytest.mark.parametrize("suffix", ["ckpt", "pt", "pth", "bin"])
def test_pickle_file(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(PickleError, match=r"can run any code when it is read.*safe_serialization=True"):
        open_checkpoint(str(tmp_path / f"model.{suffix}"))


def test_pickle_folder(folder: Folder, tmp_path: Path) -> None:
    root = folder()
    (root / UNET).rename(root / UNET.with_suffix(".bin"))
    with pytest.raises(PickleError, match=r"unet/diffusion_pytorch_model\.bin is a pickle"):
        open_checkpoint(str(root))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "v1-5.ckpt").touch()
    with pytest.raises(PickleError, match=r"v1-5\.ckpt"):
        open_checkpoint(str(tmp_path / "old"))


def test_folder_of_something_else(tmp_path: Path) -> None:
    assert "has no model_index.json" in refused(tmp_path)
    (tmp_path / "v1-5.safetensors").touch()
    assert f"say {tmp_path / 'v1-5.safetensors'}" in refused(tmp_path)


# What is refused: incomplete and damaged files.


@pytest.mark.parametrize(
    "name", ["unet/config.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json"]
)
def test_missing_json(folder: Folder, name: str) -> None:
    root = folder()
    (root / name).unlink()
    assert Path(name).name in refused(root)


def test_json_that_is_none(folder: Folder) -> None:
    root = folder()
    (root / "unet" / "config.json").write_text("{")
    assert "is not JSON" in refused(root)
    (root / "unet" / "config.json").write_text("[]")
    assert "holds a JSON list" in refused(root)


def test_missing_and_interrupted_weights(folder: Folder) -> None:
    root = folder()
    (root / UNET).unlink()
    assert "has no .safetensors weights" in refused(root)
    partial = root / ".cache" / "huggingface" / "download" / "unet" / "abc.incomplete"
    partial.parent.mkdir(parents=True)
    partial.touch()
    assert "the download was interrupted (abc.incomplete), run it again" in refused(root)


@pytest.mark.parametrize("name", ["model_index.json", str(UNET)])
def test_git_lfs_pointer(folder: Folder, name: str) -> None:
    root = folder()
    (root / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3438167540\n")
    assert "run `git lfs pull`" in refused(root)


def with_header(path: Path, header: bytes) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header)


ENTRY = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "bad safetensors header"),
        (b"[" * 100_000, "bad safetensors header"),
        (b'{"a":' + ENTRY + b',"a":' + ENTRY + b"}", "'a' is there twice"),
        (b'{"a":{"dtype":"F32"}}', "bad safetensors header"),
        (b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', "bad safetensors header"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,Infinity]}}', "bad safetensors header"),
        (b'{"a":{"dtype":"F32","shape":[1e400],"data_offsets":[0,4]}}', "bad safetensors header"),
        (b'{"a":{"dtype":"F32","shape":[%d],"data_offsets":[0,4]}}' % (2**70), "bad safetensors header"),
        (b'{"__metadata__":3}', "bad safetensors header"),
        (b'{"a":{"dtype":"F4","shape":[1],"data_offsets":[0,4]}}', "'F4'"),
        (b'{"a":' + ENTRY + b"}", "is truncated"),
    ],
)
def test_bad_header(tmp_path: Path, header: bytes, message: str) -> None:
    with_header(tmp_path / "a.safetensors", header)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value)


def test_huge_header(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes((17 << 20).to_bytes(8, "little") + b"{}")
    os.truncate(path, 18 << 20)
    assert "a header of 17,825,792 bytes, at most 16,777,216" in refused(path)


@pytest.mark.parametrize("size", [0, 7, 8, 1000, -1])
def test_truncated_file(folder: Folder, size: int) -> None:
    root = folder()
    whole = (root / UNET).stat().st_size
    os.truncate(root / UNET, size % whole)
    assert f"is truncated: {size % whole:,} bytes of" in refused(root)


def test_offsets_that_lie(folder: Folder) -> None:
    root = folder()
    data = (root / UNET).read_bytes()
    offset = data.index(b'"data_offsets":[0,')
    # The header still parses and fits the file; only the reader of tensors notices.
    (root / UNET).write_bytes(
        data[:offset] + data[offset:].replace(b'"data_offsets":[0,', b'"data_offsets":[4,', 1)
    )
    checkpoint = open_checkpoint(str(root))
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.load(Component.UNET)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("conv_in.bias"), "unet: conv_in.bias is missing;"),
        (lambda state: [state.pop(n) for n in [*state][:3]], " and 2 more are missing;"),
        (
            lambda state: state.update(extra=torch.ones(1)),
            "unet: extra is not part of a UNet2DConditionModel;",
        ),
        (
            lambda state: state.update({"conv_in.bias": torch.ones(31)}),
            "conv_in.bias is of another shape: [31], the config says [32];",
        ),
        (
            lambda state: state.update({"conv_in.bias": torch.ones(32, dtype=torch.int8)}),
            "conv_in.bias is quantised (torch.int8);",
        ),
        (
            lambda state: state.update({"text_model.conv_in.bias": torch.ones(32)}),
            "conv_in.bias is there under two names;",
        ),
    ],
)
def test_weights_that_do_not_fit(
    folder: Folder, edit_weights: Edit, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    root = folder()
    edit_weights(root / UNET, change)
    assert message in refused(root)


# What is refused: models that rt does not run.


@pytest.mark.parametrize("name", ["pipeline.py", "unet/model.py"])
def test_own_code(folder: Folder, name: str) -> None:
    root = folder()
    (root / name).touch()
    assert f"code of its own ({name})" in refused(root)


def test_code_that_no_loader_would_run(folder: Folder) -> None:
    root = folder()
    (root / "train").mkdir()
    (root / "train" / "train.py").touch()
    assert open_checkpoint(str(root)).components


def test_auto_map(folder: Folder, edit_json: Edit) -> None:
    root = folder()
    edit_json(root / "unet" / "config.json", auto_map={"AutoModel": "model.Net"})
    assert "`auto_map`" in refused(root)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, "is a FluxPipeline; rt reads"),
        ("model_index.json", {"_class_name": None}, "is a model of no named class"),
        ("model_index.json", {"_class_name": ["x"]}, "is a ['x']; rt reads"),
        (
            "model_index.json",
            {"vae": ["diffusers", "AutoencoderTiny"]},
            "has AutoencoderTiny as vae, rt reads",
        ),
        ("model_index.json", {"unet": [None, None]}, "has no class as unet"),
        ("model_index.json", {"unet": 3}, "has no class as unet"),
        ("unet/config.json", {"_class_name": "UNet2DModel"}, "has UNet2DModel as unet"),
        ("unet/config.json", {"in_channels": 8}, "8 input channels, for image editing"),
        ("unet/config.json", {"in_channels": 6}, "6 input channels, for another task"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "wants class embeddings"),
        ("unet/config.json", {"num_class_embeds": 1000}, "wants class embeddings"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "an embedding of the guidance scale"),
        ("unet/config.json", {"encoder_hid_dim_type": "image_proj"}, "projected image or text features"),
        ("unet/config.json", {"addition_embed_type": "text"}, "addition_embed_type 'text', not None"),
        ("unet/config.json", {"cross_attention_dim": 32}, "64 channels and the U-Net wants 32"),
        ("unet/config.json", {"sample_size": [8, 16, 8]}, "sample_size has 3 entries, expected a height"),
        ("unet/config.json", {"sample_size": 0}, "sample_size is 0, expected 1 to 1,048,576"),
        ("unet/config.json", {"sample_size": 8.0}, "sample_size is 8.0, expected a whole number"),
        ("unet/config.json", {"block_out_channels": [32, 33]}, "the config of unet describes no network"),
        ("vae/config.json", {"latents_mean": [0, 0, 0, 0]}, "shifted as well as scaled"),
        ("vae/config.json", {"block_out_channels": None}, "block_out_channels is None, expected a list"),
        ("vae/config.json", {"block_out_channels": [32] * 11}, "has 11 entries, expected 1 to 10"),
        ("text_encoder/config.json", {"max_position_embeddings": 2}, "2: no room for a word"),
    ],
)
def test_other_models(
    folder: Folder, edit_json: Edit, name: str, values: dict[str, object], message: str
) -> None:
    root = folder()
    edit_json(root / name, **values)
    assert message in refused(root)


def test_config_without_defaults_of_clip() -> None:
    tiny = open_checkpoint("synthetic:tiny").configs
    text = {
        key: value
        for key, value in tiny["text_encoder"].items()
        if key not in ("hidden_size", "max_position_embeddings")
    }
    unet = {**tiny["unet"], "cross_attention_dim": 512}
    spec = read_spec({**tiny, "text_encoder": text, "unet": unet}, "x")
    assert (spec.context_size, spec.max_tokens) == (512, 77)


def test_config_without_a_fact(folder: Folder) -> None:
    root = folder()
    config = json.loads((root / "vae" / "config.json").read_text())
    del config["latent_channels"]
    (root / "vae" / "config.json").write_text(json.dumps(config))
    assert "in the configs, vae has no latent_channels; correct it" in refused(root)


def test_sdxl_refiner(folder: Folder, edit_json: Edit) -> None:
    root = folder(Family.SDXL)
    edit_json(
        root / "model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline", text_encoder=[None, None]
    )
    assert "is an SDXL refiner" in refused(root)


# The hub, without a network.


class FakeHub:
    """A repository in a folder, and huggingface_hub's functions as `rt.export.hub` calls them."""

    def __init__(self, remote: Path, snapshot: Path) -> None:
        self.remote, self.snapshot = remote, snapshot
        self.downloaded: list[str] = []

    def names(self) -> list[str]:
        return [path.relative_to(self.remote).as_posix() for path in self.remote.rglob("*") if path.is_file()]

    def model_info(self, repo: str, *, revision: str | None) -> SimpleNamespace:
        assert (repo, revision) == ("org/name", "main")
        return SimpleNamespace(
            sha=COMMIT, siblings=[SimpleNamespace(rfilename=name) for name in self.names()]
        )

    def snapshot_download(
        self, repo: str, *, revision: str, allow_patterns: list[str], local_files_only: bool
    ) -> str:
        assert (repo, revision, local_files_only) == ("org/name", COMMIT, False)
        for name in self.names():
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                (self.snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.remote / name, self.snapshot / name)
                self.downloaded.append(name)
        return str(self.snapshot)


@pytest.fixture
def fake_hub(folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(folder(), tmp_path / "cache" / "models--org--name" / "snapshots" / COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    monkeypatch.setattr(hub, "snapshot_download", fake.snapshot_download)
    return fake


def test_hub_downloads_what_it_reads(fake_hub: FakeHub) -> None:
    for name in ("unet/diffusion_pytorch_model.bin", "v1-5.ckpt", "v1-5.safetensors"):
        (fake_hub.remote / name).touch()
    shutil.copy(fake_hub.remote / UNET, fake_hub.remote / UNET.with_suffix(".fp16.safetensors"))
    (fake_hub.remote / "safety_checker").mkdir()
    (fake_hub.remote / "safety_checker" / "config.json").write_text("{}")
    (fake_hub.remote / "README.md").write_text("---\nlicense: 'mit'\n---\n")
    checkpoint = open_checkpoint("org/name", revision="main")
    assert (checkpoint.kind, checkpoint.revision, checkpoint.licence) == (Kind.HUB, COMMIT, "mit")
    assert sorted(fake_hub.downloaded) == sorted([*checkpoint.files, "README.md"])
    assert_same_as_libraries(checkpoint, fake_hub.remote)


def test_hub_downloads_a_variant_and_else_the_plain(
    fake_hub: FakeHub, caplog: pytest.LogCaptureFixture
) -> None:
    (fake_hub.remote / UNET).rename(fake_hub.remote / UNET.with_suffix(".fp16.safetensors"))
    shutil.copy(fake_hub.remote / VAE, fake_hub.remote / VAE.with_suffix(".fp16.safetensors"))
    checkpoint = open_checkpoint("org/name", revision="main", variant="fp16")
    weights = {name for name in fake_hub.downloaded if name.endswith(".safetensors")}
    assert weights == {f"{path.with_suffix('.fp16.safetensors')}" for path in (UNET, VAE)} | {str(TEXT)}
    assert weights <= checkpoint.files.keys()
    said = [record for record in caplog.records if "its plain weights are taken" in record.getMessage()]
    assert len(said) == 1 and "text_encoder" in said[0].getMessage()
    assert "no variant 'bf16'" in refused("org/name", revision="main", variant="bf16")


def test_hub_offline_without_what_others_did_not_fetch(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a snapshot the hub's library keeps the list of all files of the repository."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    storage = tmp_path / "cache" / "models--org--name"
    for name in ("refs", "trees"):
        (storage / name).mkdir(parents=True)
    (storage / "refs" / "main").write_text(COMMIT)
    snapshot = Path(shutil.copytree(folder(), storage / "snapshots" / COMMIT))
    files = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()]
    missing = ["README.md", "LICENSE", "vae/diffusion_pytorch_model.fp16.safetensors", "tokenizer/more.json"]
    listing = {name: {"size": 9, "blob_id": "0" * 40} for name in (*files, *missing)}
    tree = {"format_version": 1, "files": listing}
    (storage / "trees" / f"{COMMIT}.json").write_text(json.dumps(tree))
    assert open_checkpoint("org/name", offline=True).revision == COMMIT
    (snapshot / "unet" / "config.json").unlink()
    assert "unet/config.json is missing" in refused("org/name", offline=True)


def test_hub_refusals_come_before_weights(fake_hub: FakeHub, edit_json: Edit) -> None:
    (fake_hub.remote / "pipeline.py").touch()
    assert "org/name has code of its own" in refused("org/name", revision="main")
    assert fake_hub.downloaded == []
    (fake_hub.remote / "pipeline.py").unlink()
    (fake_hub.remote / UNET).rename(fake_hub.remote / UNET.with_suffix(".bin"))
    with pytest.raises(PickleError, match=r"unet/diffusion_pytorch_model\.bin"):
        open_checkpoint("org/name", revision="main")
    assert not any(name.endswith(".safetensors") for name in fake_hub.downloaded)
    edit_json(fake_hub.remote / "model_index.json", _class_name="FluxPipeline")
    assert "org/name is a FluxPipeline" in refused("org/name", revision="main")
    (fake_hub.remote / "model_index.json").unlink()
    assert "org/name has no model_index.json" in refused("org/name", revision="main")


def test_hub_offline(folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert "is not in the hub's cache" in refused("org/name", offline=True)
    storage = tmp_path / "cache" / "models--org--name"
    (storage / "refs").mkdir(parents=True)
    (storage / "refs" / "main").write_text(COMMIT)
    snapshot = Path(shutil.copytree(folder(), storage / "snapshots" / COMMIT))
    checkpoint = open_checkpoint("org/name", offline=True)
    assert checkpoint.revision == COMMIT
    assert_same_as_libraries(checkpoint, snapshot)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert open_checkpoint("org/name").revision == COMMIT
    (snapshot / UNET).unlink()
    (storage / "blobs").mkdir()
    (storage / "blobs" / "ab12.incomplete").touch()
    assert "the download was interrupted (ab12.incomplete)" in refused("org/name")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.GatedRepoError("x", response=Mock()), "https://huggingface.co/org/name and set HF_TOKEN"),
        (errors.RepositoryNotFoundError("x", response=Mock()), "neither a folder here nor a repository"),
        (errors.RevisionNotFoundError("x", response=Mock()), "has no revision 'main' on the hub"),
        (ConnectionError("no route\nto host"), r"cannot be had from the hub \(no route\); --offline uses"),
        (TimeoutError(), r"cannot be had from the hub \(TimeoutError\)"),
    ],
)
def test_hub_that_fails(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    monkeypatch.setattr(fake_hub, "model_info", Mock(side_effect=error))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint("org/name", revision="main")
