"""The demo model's world: captions say what is drawn, held-out scenes stay out, the judge knows the real ones."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import CLIPTokenizer


def test_captions(code: SimpleNamespace) -> None:
    scene = code.world.Scene
    heart, apple = (code.world.Emoji("x", name) for name in ("a red heart", "an apple"))
    assert scene((heart,)).caption == "a red heart"
    assert scene((apple,), "orange").caption == "an apple on an orange background"
    assert scene((apple,), "blue", "top left").caption == "an apple at the top left on a blue background"
    assert (
        scene((heart, apple), "grey", "left of").caption
        == "a red heart left of an apple on a grey background"
    )


def test_names_are_different_and_fit_the_context(code: SimpleNamespace) -> None:
    emoji = code.world.load(128)
    assert len({one.name for one in emoji}) == len({one.character for one in emoji}) == 128
    longest = max(len(one.name.split()) for one in emoji)
    assert 2 * longest + len(["left", "of", "on", "a", "purple", "background"]) + 2 <= code.world.CONTEXT


@pytest.mark.parametrize("count", [1, 129])
def test_how_many_there_are(code: SimpleNamespace, count: int) -> None:
    with pytest.raises(SystemExit, match=r"emoji\.tsv lists 2 to 128"):
        code.world.load(count)


def test_nothing_held_out_is_trained_on(code: SimpleNamespace, rng: np.random.Generator) -> None:
    """By what a scene shows, not by its own word: no reserved combination appears in any training scene."""
    emoji = code.world.load(12)

    def combinations(held_out: bool) -> Counter[tuple[str, ...]]:
        seen: Counter[tuple[str, ...]] = Counter()
        for _ in range(6000):
            scene = code.world.draw(rng, emoji, held_out)
            names = sorted(one.name for one in scene.emoji)
            if len(names) == 2:
                seen[("pair", *names)] += 1
            if scene.colour != "white":
                seen.update(("colour", name, scene.colour) for name in names)
            if scene.place in code.world.CORNERS:
                seen["corner", names[0], scene.place] += 1
        return seen

    trained = combinations(held_out=False)
    possible = {key for key in (*trained, *combinations(held_out=True))}
    kept = possible - trained.keys()
    assert 0.1 < len(kept) / len(possible) < 0.3
    assert min(trained.values()) > 1  # so that what is absent is absent on purpose


def test_every_word_is_one_token(code: SimpleNamespace, rng: np.random.Generator, tmp_path: Path) -> None:
    emoji = code.world.load(48)
    captions = [code.world.draw(rng, emoji, bool(i % 2)).caption for i in range(800)]
    code.vocabulary.write(tmp_path, captions, code.world.CONTEXT)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    assert tokenizer.model_max_length == code.world.CONTEXT
    for caption in captions:
        words = [token.removesuffix("</w>") for token in tokenizer.tokenize(caption)]
        assert words == caption.split()
    assert tokenizer.decode(tokenizer("zebra 7").input_ids, skip_special_tokens=True).strip() == "zebra 7"


def test_emoji_stand_on_the_grid_and_inside(
    code: SimpleNamespace, renderer: object, rng: np.random.Generator
) -> None:
    for one in code.world.load(128):
        scene = code.world.Scene((one,), "blue", "bottom right")
        plain, moved = renderer(scene), renderer(scene, rng)
        background = np.array(code.world.COLOURS["blue"], np.uint8)
        boxes = []
        for picture in (plain, moved):
            rows, columns = np.nonzero((picture != background).any(axis=2))
            boxes.append((rows.min(), columns.min(), rows.max(), columns.max()))
        shifts = np.subtract(boxes[1], boxes[0])
        assert np.isin(shifts, (-4, 0, 4)).all() and tuple(shifts[:2]) == tuple(shifts[2:])


@pytest.mark.parametrize("size", [64, 128])
def test_the_judge_knows_real_pictures(
    code: SimpleNamespace, renderer: object, rng: np.random.Generator, size: int
) -> None:
    """Also under noise; and it does not say yes to the neighbour's picture."""
    emoji = code.world.load(48)
    renderer = code.render.Renderer(size)
    judge = code.judge.Judge(emoji, renderer)
    for pairs in (False, True):
        scenes = code.judge.held_out(rng, emoji, 12, pairs)
        assert all(scene.held_out and (len(scene.emoji) == 2) == pairs for scene in scenes)
        pictures = [renderer(scene, rng) for scene in scenes]
        noisy = [np.clip(p + rng.normal(0, 20, p.shape), 0, 255).astype(np.uint8) for p in pictures]
        assert all(judge(scene, picture).right for scene, picture in zip(scenes, noisy, strict=True))
        for scene, other, picture in zip(scenes, scenes[1:] + scenes[:1], noisy[1:] + noisy[:1], strict=True):
            assert scene.colour == other.colour or not judge(scene, picture).right


def test_a_wrong_picture_is_told_with_what_it_shows(code: SimpleNamespace, renderer: object) -> None:
    emoji = code.world.load(8)
    judge = code.judge.Judge(emoji, renderer)
    asked, other = code.world.Scene((emoji[0],), "blue"), code.world.Scene((emoji[3],), "green")
    assert str(judge(asked, renderer(asked))) == "a red heart on a blue background"
    wrong = str(judge(asked, renderer(other)))
    assert wrong == "a red heart on a blue background [a moon; green]"


def test_more_held_out_scenes_than_there_are(code: SimpleNamespace, rng: np.random.Generator) -> None:
    with pytest.raises(SystemExit, match=r"^error: 2 emoji have no 500 held-out singles: ask for fewer"):
        code.judge.held_out(rng, code.world.load(2), 500, pairs=False)


def test_a_font_that_is_not_there(code: SimpleNamespace) -> None:
    with pytest.raises(SystemExit, match=r"^error: Noto Color Emoji was not found at /nowhere\.ttf"):
        code.render.Renderer(64, "/nowhere.ttf")
