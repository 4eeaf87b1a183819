#!/usr/bin/env bash
# Lints the contract and generates its code:  buf.sh lint | buf.sh generate
#
# The format of the events is CloudEvents' own. Its proto file comes with the SDK, so both stand beside each other in a
# temporary folder while buf works.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

buf() { go run github.com/bufbuild/buf/cmd/buf@v1.75.0 "$@"; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r isobar buf.yaml buf.gen.yaml "$work"
sdk=$(go list -m -f '{{.Dir}}' github.com/cloudevents/sdk-go/binding/format/protobuf/v2)
install -m 644 "$sdk/pb/cloudevent.proto" "$work"

here=$PWD
case ${1:-} in
lint)
  cd "$work"
  buf lint --path isobar
  ;;
generate)
  (cd "$work" && buf generate --path isobar)
  cp -r "$work/isobar" "$here"
  ;;
*)
  echo "usage: $0 lint|generate" >&2
  exit 2
  ;;
esac
