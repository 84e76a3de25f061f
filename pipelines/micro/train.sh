#!/bin/sh
# Make flux2-micro from nothing: measure steps, then train, judge and write.
#   pipelines/micro/train.sh FOLDER [--set autoencoder.steps=4000 ...]      PYTHON=python3 by default
set -eu
folder=$1
shift
cd "$(dirname "$0")/../.."
recipe=pipelines/micro/recipe.toml
"${PYTHON:-python3}" -m stages pretrain bench --recipe $recipe --output "$folder" "$@"
exec "${PYTHON:-python3}" -m stages pretrain all --recipe $recipe --output "$folder" "$@"
