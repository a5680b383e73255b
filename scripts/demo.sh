#!/usr/bin/env bash
# Set up, build the demo model, and draw: the prompts given, or the six of the README. Prints the pictures' paths.
source "$(dirname "$0")/venv.sh" build,openvino,onnxruntime,plot,dev

model=examples/emoji-ldm
{ [ out/emoji/manifest.json -nt $model/unet/diffusion_pytorch_model.safetensors ] \
    && rt inspect out/emoji > /dev/null 2>&1; } || rt build $model -o out/emoji --force

[ $# -gt 0 ] || set -- "a panda" "a red heart" "a pizza on a blue background" "a rocket" \
    "a fox left of a sunflower" "a ghost above a house on a purple background"
prompts=()
for prompt in "$@"; do prompts+=(--prompt "$prompt"); done
rt run out/emoji "${prompts[@]}" --steps 20 --guidance-scale 4 --seed 7 -o out/ --sheet out/sheet.png --force
