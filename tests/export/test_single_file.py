from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rt.errors import CheckpointError, ConfigError
from rt.export import single_file
from rt.export.checkpoint import Checkpoint, open_checkpoint
from rt.export.source import Kind
from rt.model import Component, Family

State = dict[str, Tensor]
Folder = Callable[[Family], Path]
Rules = tuple[tuple[str, str], ...]

# From diffusers' names to the original ones, written by hand for the tiny models: rt converts the other way
# with diffusers' own functions, which this therefore checks.

_RESNET: Rules = (
    (r"\.norm1\.", ".in_layers.0."),
    (r"\.conv1\.", ".in_layers.2."),
    (r"\.time_emb_proj\.", ".emb_layers.1."),
    (r"\.norm2\.", ".out_layers.0."),
    (r"\.conv2\.", ".out_layers.3."),
    (r"\.conv_shortcut\.", ".skip_connection."),
)
_UNET: Rules = (
    (r"^time_embedding\.linear_1", "time_embed.0"),
    (r"^time_embedding\.linear_2", "time_embed.2"),
    (r"^add_embedding\.linear_1", "label_emb.0.0"),
    (r"^add_embedding\.linear_2", "label_emb.0.2"),
    (r"^conv_in", "input_blocks.0.0"),
    (r"^conv_norm_out", "out.0"),
    (r"^conv_out", "out.2"),
    (r"^mid_block\.resnets\.0", "middle_block.0"),
    (r"^mid_block\.attentions\.0", "middle_block.1"),
    (r"^mid_block\.resnets\.1", "middle_block.2"),
)
_VAE: Rules = (
    (r"down_blocks\.(\d)\.resnets\.", r"down.\1.block."),
    (r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample."),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_", "mid.attn_1."),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
)
_OPEN_CLIP: Rules = (
    (r"^(text_model\.)?encoder\.layers\.", "transformer.resblocks."),
    (r"^(text_model\.)?embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^(text_model\.)?embeddings\.token_embedding", "token_embedding"),
    (r"^(text_model\.)?final_layer_norm", "ln_final"),
    (r"layer_norm(\d)", r"ln_\1"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"self_attn", "attn"),
)


def rename(name: str, rules: Rules) -> str:
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


def original_unet(state: Mapping[str, Tensor], layers: int) -> State:
    blocks_with_attention = {
        name.split(".")[1] for name in state if re.match(r"up_blocks\.\d\.attentions", name)
    }

    def original(name: str) -> str:
        if match := re.match(
            r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)", name
        ):
            side, block, part, layer = match[1], int(match[2]), match[3], int(match[4])
            first = block * (layers + 1)
            if part == "downsamplers":
                prefix = f"input_blocks.{first + layers + 1}.0.op"
                return name.replace(f"{match[0]}.conv", prefix)
            if part == "upsamplers":
                place = 2 if match[2] in blocks_with_attention else 1
                return name.replace(match[0], f"output_blocks.{first + layers}.{place}")
            number = first + layer + (side == "down")
            side = "input" if side == "down" else "output"
            name = name.replace(match[0], f"{side}_blocks.{number}.{int(part == 'attentions')}")
        name = rename(name, _UNET)
        return (
            rename(name, _RESNET)
            if re.match(r"(in|out)put_blocks\.\d+\.0|middle_block\.[02]", name)
            else name
        )

    return {f"model.diffusion_model.{original(name)}": tensor for name, tensor in state.items()}


def original_vae(state: Mapping[str, Tensor], levels: int) -> State:
    def original(name: str) -> str:
        if match := re.match(r"decoder\.up_blocks\.(\d)\.(resnets|upsamplers\.0)", name):
            part = "block" if match[2] == "resnets" else "upsample"
            name = name.replace(match[0], f"decoder.up.{levels - 1 - int(match[1])}.{part}")
        return rename(name, _VAE)

    converted = {f"first_stage_model.{original(name)}": tensor for name, tensor in state.items()}
    return {  # the attention was a 1 × 1 convolution
        name: tensor[:, :, None, None] if "attn_1" in name and tensor.ndim == 2 else tensor
        for name, tensor in converted.items()
    }


def original_open_clip(state: Mapping[str, Tensor], prefix: str) -> State:
    state = {rename(name, _OPEN_CLIP): tensor for name, tensor in state.items()}
    for layer in {name.split(".")[2] for name in state if "resblocks" in name}:
        for kind in ("weight", "bias"):
            attention = f"transformer.resblocks.{layer}.attn"
            parts = [state.pop(f"{attention}.{part}_proj.{kind}") for part in "qkv"]
            state[f"{attention}.in_proj_{kind}"] = torch.cat(parts)
    if "text_projection.weight" in state:
        state["text_projection"] = state.pop("text_projection.weight").T
    state["logit_scale"] = torch.ones(())
    return {f"{prefix}{name}": tensor.contiguous() for name, tensor in state.items()}


def original_state(checkpoint: Checkpoint, read: Callable[[Component], Mapping[str, Tensor]]) -> State:
    family, configs = checkpoint.spec.family, checkpoint.configs
    state = original_unet(read(Component.UNET), configs["unet"]["layers_per_block"])
    state |= original_vae(read(Component.VAE_DECODER), len(configs["vae"]["block_out_channels"]))
    text = {
        f"text_model.{name.removeprefix('text_model.')}": tensor
        for name, tensor in read(Component.TEXT_ENCODER).items()
    }
    layers = configs["text_encoder"]["num_hidden_layers"]
    if family is Family.SD1:
        state |= {f"cond_stage_model.transformer.{name}": tensor for name, tensor in text.items()}
        state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(12)[None]
    elif family is Family.SD2:
        prefix = "cond_stage_model.model."
        encoder = original_open_clip(text, prefix)
        last = f"{prefix}transformer.resblocks."
        encoder |= {  # the layer that SD 2 does not use
            name.replace(f"{last}{layers - 1}.", f"{last}{layers}."): torch.randn_like(tensor)
            for name, tensor in encoder.items()
            if name.startswith(f"{last}{layers - 1}.")
        }
        state |= encoder
        state[f"{prefix}text_projection"] = torch.randn(2 * [configs["text_encoder"]["hidden_size"]])
    else:
        state |= {f"conditioner.embedders.0.transformer.{name}": tensor for name, tensor in text.items()}
        state |= original_open_clip(read(Component.TEXT_ENCODER_2), "conditioner.embedders.1.model.")
    # What training leaves in such files.
    state |= {"alphas_cumprod": torch.rand(1000), "model_ema.num_updates": torch.tensor(1, dtype=torch.int32)}
    return state


@pytest.fixture
def write(folder: Folder, tmp_path: Path) -> Callable[..., Path]:
    """The family's tiny model as one file, after `change`; its vocabulary becomes the default one."""

    def write_file(
        family: Family,
        change: Callable[[State], object] = lambda state: None,
        metadata: dict[str, str] | None = None,
    ) -> Path:
        checkpoint = open_checkpoint(str(folder(family)))
        state = original_state(checkpoint, checkpoint.source.tensors)
        change(state)
        save_file(state, tmp_path / "model.safetensors", metadata=metadata)
        return tmp_path / "model.safetensors"

    return write_file


def opens(path: Path, **options: str) -> dict[str, object]:
    tokenizer = next(path.parent.glob("*/tokenizer"))
    checkpoint = open_checkpoint(str(path), tokenizer=str(tokenizer), **options)
    return dict(checkpoint.spec.scheduler)


def refused(path: Path, **options: str | bool) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(path), **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("family", Family)
def test_round_trip(write: Callable[..., Path], tmp_path: Path, family: Family) -> None:
    path = write(family)
    root = tmp_path / family.value
    expected = open_checkpoint(str(root))
    checkpoint = open_checkpoint(
        str(path),
        tokenizer=str(root / "tokenizer"),
        prediction_type=expected.spec.scheduler["prediction_type"],
    )
    assert checkpoint.kind is Kind.SINGLE_FILE
    assert sorted(checkpoint.files) == ["model.safetensors", "tokenizer/merges.txt", "tokenizer/vocab.json"]
    assert checkpoint.components == expected.components

    for component in expected.components:
        ours, theirs = checkpoint.load(component).state_dict(), expected.load(component).state_dict()
        assert list(ours) == list(theirs)
        for name in theirs:
            assert torch.equal(ours[name], theirs[name]), f"{component.value}: {name} differs"

    # All facts but the size in training, which a file does not say.
    trained = {Family.SD1: 64, Family.SD2: 96, Family.SDXL: 128}
    facts, wanted = checkpoint.spec.to_json(), expected.spec.to_json()
    assert (facts.pop("sample_size"), wanted.pop("sample_size")) == (trained[family], 8)
    assert facts == wanted
    for encoder in expected.spec.text_encoders:
        prompt = "a cat"  # shorter than 12 bytes, so that the padding shows
        assert (checkpoint.tokenizer(encoder)(prompt).ids == expected.tokenizer(encoder)(prompt).ids).all()


@pytest.mark.parametrize("family", Family)
def test_same_outputs(write: Callable[..., Path], tmp_path: Path, family: Family) -> None:
    """Heads, activations and the like are in no tensor."""
    path = write(family)
    root = tmp_path / family.value
    single = open_checkpoint(str(path), tokenizer=str(root / "tokenizer"), prediction_type="epsilon")
    spec = single.spec
    ids = torch.randint(0, 514, (1, spec.max_tokens))
    arguments = {
        "sample": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(1, spec.max_tokens, spec.context_size),
    }
    if spec.pooled_size:
        sizes = {"text_embeds": torch.randn(1, spec.pooled_size), "time_ids": torch.rand(1, 6) * 512}
        arguments["added_cond_kwargs"] = sizes  # type: ignore[assignment]
    with torch.inference_mode():
        for component in single.components:
            ours, theirs = (checkpoint.load(component) for checkpoint in (single, open_checkpoint(str(root))))
            if component is Component.UNET:
                outputs = [unet(**arguments).sample for unet in (ours, theirs)]
            elif component is Component.VAE_DECODER:
                outputs = [vae.decode(arguments["sample"])[0] for vae in (ours, theirs)]  # type: ignore[operator]
            else:
                outputs = [encoder(ids)[0] for encoder in (ours, theirs)]
            assert outputs[0].isfinite().all()
            # Memory-mapped weights lie at other addresses, for which torch may choose another kernel.
            torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_text_encoder_without_prefix(write: Callable[..., Path], tmp_path: Path) -> None:
    def drop_prefix(state: State) -> None:
        for name in [name for name in state if ".text_model." in name]:
            state[name.replace(".text_model.", ".")] = state.pop(name)

    path = write(Family.SD1, drop_prefix)
    checkpoint = open_checkpoint(str(path), tokenizer=str(tmp_path / "sd1" / "tokenizer"))
    ours = checkpoint.load(Component.TEXT_ENCODER).state_dict()
    theirs = open_checkpoint(str(tmp_path / "sd1")).load(Component.TEXT_ENCODER).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_sd2_that_has_lost_its_last_layer(write: Callable[..., Path], tmp_path: Path) -> None:
    """As tools write it that start from diffusers' weights."""

    def cut(state: State) -> None:
        for name in [name for name in state if "resblocks.2." in name or "text_projection" in name]:
            del state[name]

    path = write(Family.SD2, cut)
    tokenizer = str(tmp_path / "sd2" / "tokenizer")
    checkpoint = open_checkpoint(str(path), tokenizer=tokenizer, prediction_type="epsilon")
    ours = checkpoint.load(Component.TEXT_ENCODER).state_dict()
    theirs = open_checkpoint(str(tmp_path / "sd2")).load(Component.TEXT_ENCODER).state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_real_architectures(folder: Folder, tmp_path: Path, name: str) -> None:
    """A file with the real header and a hole for weights: opening reads all facts and checks all shapes."""
    published = open_checkpoint(f"synthetic:{name}")
    state = original_state(published, published.source.headers)
    header, end = {}, 0
    for key, tensor in state.items():
        size = tensor.numel() * 2
        header[key] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path = tmp_path / f"{name}.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)

    tokenizer = str(folder(Family.SD1) / "tokenizer")
    prediction_type = published.spec.scheduler["prediction_type"]
    checkpoint = open_checkpoint(str(path), tokenizer=tokenizer, prediction_type=prediction_type)
    assert checkpoint.configs == published.configs
    assert checkpoint.spec == published.spec


# What the U-Net predicts.


@pytest.mark.parametrize("family", [Family.SD1, Family.SDXL])
def test_prediction_type_by_default(write: Callable[..., Path], family: Family) -> None:
    assert opens(write(family))["prediction_type"] == "epsilon"


def test_prediction_type_of_sd2_must_be_said(write: Callable[..., Path]) -> None:
    path = write(Family.SD2)
    assert "pass --prediction-type v_prediction (768-pixel models) or epsilon" in refused(path)
    assert opens(path, prediction_type="v_prediction")["prediction_type"] == "v_prediction"


@pytest.mark.parametrize(
    ("said", "meant"),
    [("v", "v_prediction"), ("V", "v_prediction"), ("v_prediction", "v_prediction"), ("epsilon", "epsilon")],
)
def test_prediction_type_by_metadata(write: Callable[..., Path], said: str, meant: str) -> None:
    path = write(Family.SD2, metadata={"modelspec.prediction_type": said, "modelspec.license": "MIT"})
    assert opens(path)["prediction_type"] == meant
    assert (
        single_file.open_single_file(path, str(next(path.parent.glob("*/tokenizer"))), None, True).licence
        == "MIT"
    )


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ('    parameterization: "v"', "v_prediction"),
        ("    parameterization: v  # as trained", "v_prediction"),
        ("    target: sgm.modules.diffusionmodules.denoiser_scaling.VScaling", "v_prediction"),
        ("    target: sgm.modules.diffusionmodules.denoiser_scaling.EpsScaling", "epsilon"),
        ("    # parameterization: v", "epsilon"),
        ("    linear_start: 0.00085", "epsilon"),
    ],
)
def test_prediction_type_by_sidecar(write: Callable[..., Path], line: str, meant: str) -> None:
    path = write(Family.SD2)
    path.with_suffix(".yaml").write_text(f"model:\n  params:\n{line}\n    timesteps: 1000\n")
    assert opens(path)["prediction_type"] == meant
    tokenizer = str(next(path.parent.glob("*/tokenizer")))
    assert "model.yaml" in open_checkpoint(str(path), tokenizer=tokenizer).files


def test_prediction_type_by_keys(write: Callable[..., Path]) -> None:
    path = write(Family.SDXL, lambda state: state.update(v_pred=torch.ones(1), ztsnr=torch.ones(1)))
    scheduler = opens(path)
    assert scheduler["prediction_type"] == "v_prediction"
    assert scheduler["rescale_betas_zero_snr"] is True


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize(("beside", "says"), [("metadata", "its metadata"), ("yaml", "model.yaml")])
def test_the_key_wins(
    write: Callable[..., Path], caplog: pytest.LogCaptureFixture, family: Family, beside: str, says: str
) -> None:
    """Trainers and merges copy metadata and .yaml files from models of another kind."""
    stale = {"modelspec.prediction_type": "epsilon"} if beside == "metadata" else None
    path = write(family, lambda state: state.update(v_pred=torch.tensor([])), metadata=stale)
    if beside == "yaml":
        path.with_suffix(".yaml").write_text("model:\n  params:\n    timesteps: 1000\n")
    scheduler = opens(path)
    assert scheduler["prediction_type"] == "v_prediction"
    assert "rescale_betas_zero_snr" not in scheduler
    assert f"the key v_pred says v_prediction, and {says} epsilon" in caplog.text
    caplog.clear()
    assert opens(path, prediction_type="epsilon")["prediction_type"] == "epsilon"
    assert not caplog.records


def test_a_yaml_that_contradicts_metadata(
    write: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = write(Family.SD1, metadata={"modelspec.prediction_type": "epsilon"})
    path.with_suffix(".yaml").write_text('    parameterization: "v"\n')
    assert opens(path)["prediction_type"] == "v_prediction"
    assert "model.yaml says v_prediction, and its metadata epsilon" in caplog.text


def test_keys_and_metadata_that_agree(write: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    path = write(
        Family.SDXL,
        lambda state: state.update(v_pred=torch.ones(1)),
        metadata={"modelspec.prediction_type": "v"},
    )
    assert opens(path)["prediction_type"] == "v_prediction"
    assert not caplog.records


@pytest.mark.parametrize(
    ("family", "sampler"),
    [(Family.SD1, "DDIMScheduler"), (Family.SDXL, "EulerDiscreteScheduler")],
)
def test_zero_snr_without_v(
    write: Callable[..., Path], caplog: pytest.LogCaptureFixture, family: Family, sampler: str
) -> None:
    """The key is obeyed, by a sampler that knows such noise levels."""
    path = write(family, lambda state: state.update(ztsnr=torch.ones(1)))
    tokenizer = str(next(path.parent.glob("*/tokenizer")))
    checkpoint = open_checkpoint(str(path), tokenizer=tokenizer)
    scheduler = checkpoint.spec.scheduler
    assert scheduler["prediction_type"] == "epsilon"
    assert scheduler["rescale_betas_zero_snr"] is True and scheduler["timestep_spacing"] == "trailing"
    assert scheduler["_class_name"] == checkpoint.configs["model_index"]["scheduler"][1] == sampler
    assert "has the key ztsnr" in caplog.text and "; --prediction-type says otherwise" in caplog.text


@pytest.mark.parametrize("said", ["epsilon", "v_prediction", "sample"])
def test_zero_snr_and_what_the_user_says(
    write: Callable[..., Path], caplog: pytest.LogCaptureFixture, said: str
) -> None:
    path = write(Family.SDXL, lambda state: state.update(ztsnr=torch.ones(1)))
    tokenizer = str(next(path.parent.glob("*/tokenizer")))
    checkpoint = open_checkpoint(str(path), tokenizer=tokenizer, prediction_type=said)
    assert checkpoint.spec.scheduler["prediction_type"] == said
    assert checkpoint.configs["scheduler"]["prediction_type"] == said
    assert "says otherwise" not in caplog.text
    assert ("predicts epsilon, as --prediction-type says" in caplog.text) is (said == "epsilon")


# What a file has beside the model.


@pytest.mark.parametrize("family", Family)
def test_what_no_part_needs_is_left_out(write: Callable[..., Path], tmp_path: Path, family: Family) -> None:
    clip = "conditioner.embedders.0." if family is Family.SDXL else "cond_stage_model."
    names = [
        "model_ema.decay",
        "model_ema.diffusion_modelinput_blocks00weight",
        "embedding_manager.embedder.weight",
        "alphas_cumprod",
        "betas",
        "denoiser.sigmas",
        "first_stage_model.loss.logvar",
        "first_stage_model.model_ema.decay",
        f"{clip}logit_scale",
        f"{clip}transformer.logit_scale",
        f"{clip}transformer.text_projection.weight",
        f"{clip}transformer.vision_model.post_layernorm.bias",
        f"{clip}transformer.visual_projection.weight",
    ]
    if family is not Family.SD1:
        open_clip = "conditioner.embedders.1.model." if family is Family.SDXL else "cond_stage_model.model."
        names += [
            f"{open_clip}{name}"
            for name in ("attn_mask", "visual.proj", "visual.transformer.resblocks.0.ln_1.bias")
        ]
    path = write(family, lambda state: state.update({name: torch.ones(3) for name in names}))
    tokenizer = str(tmp_path / family.value / "tokenizer")
    checkpoint = open_checkpoint(str(path), tokenizer=tokenizer, prediction_type="epsilon")
    for component in checkpoint.components:
        ours = checkpoint.load(component).state_dict()
        theirs = open_checkpoint(str(tmp_path / family.value)).load(component).state_dict()
        assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in theirs)


# The autoencoder.


@pytest.mark.parametrize("family", Family)
def test_without_a_vae(write: Callable[..., Path], tmp_path: Path, family: Family) -> None:
    """Another one is named, in any layout; it is scaled as the family's."""
    taken: State = {}

    def take(state: State) -> None:
        for name in [name for name in state if name.startswith("first_stage_model.")]:
            taken[name] = state.pop(name)

    path = write(family, take)
    root = tmp_path / family.value
    options = {"tokenizer": str(root / "tokenizer"), "prediction_type": "epsilon"}
    message = refused(path, **options)
    assert "has no VAE (first_stage_model.*): name one with --vae, such as " in message

    expected = open_checkpoint(str(root)).load(Component.VAE_DECODER).state_dict()
    scale = {Family.SD1: 0.18215, Family.SD2: 0.18215, Family.SDXL: 0.13025}[family]
    bare = {name.removeprefix("first_stage_model."): tensor for name, tensor in taken.items()}
    vae = tmp_path / "vae.safetensors"
    for layout in (taken, {**bare, "loss.logvar": torch.ones(1)}, expected):
        save_file({name: tensor.contiguous() for name, tensor in layout.items()}, vae)
        checkpoint = open_checkpoint(str(path), vae=str(vae), **options)
        assert checkpoint.spec.scaling_factor == scale
        assert checkpoint.files["vae/vae.safetensors"] == vae
        got = checkpoint.load(Component.VAE_DECODER).state_dict()
        assert list(got) == list(expected) and all(torch.equal(got[name], expected[name]) for name in got)


def test_the_vae_of_another_single_file(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write(Family.SD1)
    tokenizer = str(tmp_path / "sd1" / "tokenizer")
    other = tmp_path / "other.safetensors"
    state = {name: tensor * 2 for name, tensor in load_file(path).items()}
    save_file(state, other)
    mixed, own = (
        open_checkpoint(str(path), tokenizer=tokenizer, vae=vae).load(Component.VAE_DECODER).state_dict()
        for vae in (str(other), None)
    )
    assert all(torch.equal(mixed[name], 2 * own[name]) for name in own)


# What is refused.


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("double_blocks.0.img_attn.qkv.weight", "is a Flux transformer"),
        (
            "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
            "is a Stable Diffusion 3 transformer",
        ),
        ("lora_unet_mid_block.lora_up.weight", "is a LoRA"),
        ("control_model.time_embed.0.weight", "is a ControlNet"),
        ("conditioner.embedders.0.model.ln_final.weight", "is an SDXL refiner"),
        ("edm_mean", "is an EDM model"),
        ("edm_vpred.sigma_max", "is an EDM model"),
        ("down_blocks.0.resnets.0.conv1.weight", "is one network in diffusers' layout"),
        ("decoder.conv_in.weight", "has no U-Net"),
        ("model.diffusion_model.input_blocks.0.0.weight", "has a U-Net and no text encoder"),
    ],
)
def test_other_files(tmp_path: Path, key: str, what: str) -> None:
    save_file({key: torch.ones(1)}, tmp_path / "other.safetensors")
    assert what in refused(tmp_path / "other.safetensors")


def test_inpainting(write: Callable[..., Path]) -> None:
    key = "model.diffusion_model.input_blocks.0.0.weight"
    path = write(Family.SD1, lambda state: state.update({key: torch.randn(32, 9, 3, 3)}))
    tokenizer = str(next(path.parent.glob("*/tokenizer")))
    checkpoint = open_checkpoint(str(path), tokenizer=tokenizer)
    assert checkpoint.spec.inpainting
    assert checkpoint.load(Component.UNET).config.in_channels == 9


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (
            "model.diffusion_model.middle_block.1.proj_in.weight",
            "lacks 'model.diffusion_model.middle_block.1.proj",
        ),
        ("model.diffusion_model.out.2.weight", "unet: conv_out.weight is missing"),
        (
            "model.diffusion_model.input_blocks.3.0.op.bias",
            "unet: down_blocks.0.downsamplers.0.conv.bias is missing",
        ),
        ("first_stage_model.decoder.conv_in.bias", "vae: decoder.conv_in.bias is missing"),
        (
            "first_stage_model.encoder.down.0.block.0.conv1.weight",
            "lacks 'first_stage_model.encoder.down.0.block",
        ),
    ],
)
def test_missing_tensor(write: Callable[..., Path], missing: str, message: str) -> None:
    path = write(Family.SD1, lambda state: state.pop(missing))
    assert message in refused(path, tokenizer=str(next(path.parent.glob("*/tokenizer"))))


def test_tensor_of_another_network(write: Callable[..., Path]) -> None:
    key = "model.diffusion_model.input_blocks.1.2.temporal_transformer.norm.weight"
    path = write(Family.SD1, lambda state: state.update({key: torch.ones(32)}))
    tokenizer = str(next(path.parent.glob("*/tokenizer")))
    assert f"{key} is not part of a U-Net" in refused(path, tokenizer=tokenizer)


def test_vocabulary(write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(Family.SD1)

    def no_network(repo: str, *args: object, **kwargs: object) -> Path:
        raise CheckpointError(f"{repo} is not in the hub's cache")

    monkeypatch.setattr(single_file, "download", no_network)
    message = refused(path)
    assert (
        "a single file has no CLIP vocabulary, and openai/clip-vit-large-patch14 is not in the hub's"
        in message
    )
    assert "pass --tokenizer, a folder with vocab.json and merges.txt" in message
    assert "has no vocab.json: --tokenizer needs vocab.json and merges.txt" in refused(
        path, tokenizer=str(tmp_path)
    )

    folder = tmp_path / "sd1" / "tokenizer"
    monkeypatch.setattr(single_file, "download", lambda repo, names, offline: folder)
    assert open_checkpoint(str(path)).files["tokenizer/vocab.json"] == folder / "vocab.json"

    vocab = (folder / "vocab.json").read_text()
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "vocab.json").write_text(vocab[:-1] + ', "one more": 514}')
    assert "has 515 tokens, the text encoder 514: pass its --tokenizer" in refused(path, tokenizer=str(other))


@pytest.mark.parametrize("option", ["variant", "revision"])
def test_options_of_other_kinds(write: Callable[..., Path], option: str) -> None:
    with pytest.raises(ConfigError, match="has no meaning for a single file, only for a"):
        open_checkpoint(str(write(Family.SD1)), **{option: "fp16"})  # type: ignore[arg-type]
