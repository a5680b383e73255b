#!/usr/bin/env bash
# Set up, build the demo model, draw a picture with it and print the picture's path.
source "$(dirname "$0")/venv.sh" build,openvino,onnxruntime,plot,dev
rt inspect out/emoji > /dev/null 2>&1 || rt build examples/emoji-ldm -o out/emoji --force
rt run out/emoji --prompt "${1:-a red heart}" --steps 20 --guidance-scale 5 --seed 7 -o out/ --force
