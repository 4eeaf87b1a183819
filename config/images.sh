#!/usr/bin/env bash
# Builds the programs' images with ko, pushes them to KO_DOCKER_REPO, and writes deploy/kustomization.yaml: the configuration
# CONFIG (config, if none is given) with these images, for `kubectl apply -k deploy`.
#
#   config/images.sh [CONFIG]     PLATFORMS=linux/amd64,linux/arm64 builds for more than the base image's first platform
set -euo pipefail
cd "$(dirname "$0")/.."

config=${1:-config}
programs=(functions/{ingress,publisher,redis-writer,valkey-writer,dead-letter} eventing/{kafka-source,rabbitmq-source})

[[ -f $config/kustomization.yaml ]] || { echo "$config has no kustomization.yaml" >&2; exit 2; }
[[ -n ${KO_DOCKER_REPO:-} ]] || { echo "KO_DOCKER_REPO must name the registry that the cluster pulls from, like registry.example.com/isobar" >&2; exit 2; }
command -v ko > /dev/null || { echo "ko is not there: make tools" >&2; exit 2; }

platforms=()
[[ -z ${PLATFORMS:-} ]] || platforms=(--platform "$PLATFORMS")
images=$(ko build --base-import-paths "${platforms[@]}" "${programs[@]/#/./}")

mkdir -p deploy
{
  echo "apiVersion: kustomize.config.k8s.io/v1beta1"
  echo "kind: Kustomization"
  echo "resources: [../$config]"
  echo "images:"
  for program in "${programs[@]}"; do
    image=$(grep "/${program#*/}@sha256:" <<< "$images")
    echo "  - {name: ko://isobar.dev/$program, newName: ${image%@*}, digest: ${image#*@}}"
  done
} > deploy/kustomization.yaml
echo "deploy/kustomization.yaml is $config with these images:"
while read -r image; do echo "  $image"; done <<< "$images"
