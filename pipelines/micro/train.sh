#!/bin/sh
# Make flux2-micro from nothing, as the built-in one was made: train, judge and write the two parts.
#   pipelines/micro/train.sh FOLDER [--set autoencoder.steps=4000 ...]      PYTHON=python3 by default
set -eu
folder=$1
shift
cd "$(dirname "$0")/../.."
recipe=pipelines/micro/recipe.toml
"${PYTHON:-python3}" -m stages pretrain autoencoder --recipe $recipe --set dtype=float32 --output "$folder" "$@"
exec "${PYTHON:-python3}" -m stages pretrain transformer --recipe $recipe --output "$folder" "$@"
