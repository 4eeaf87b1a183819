SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

# The linters' versions are part of what the code promises, so they stand here.
GOFUMPT := go run mvdan.cc/gofumpt@v0.12.0
STATICCHECK := go run honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOLANGCI := go run github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0

.PHONY: help
help: ## show the targets
	@awk 'BEGIN {FS = ":.*## "} /^## / {printf "\n%s\n", substr($$0, 4)} /^[a-z0-9-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

## Run

# The program takes make's place, so a signal for make's child is a signal for it.
.PHONY: run
run: ## start the servers and all programs on this machine; Ctrl-C stops them
	@go build -o .isobar/bin/run ./config/local/run
	@exec .isobar/bin/run

.PHONY: clean
clean: ## remove what make run has left: data, logs, programs
	rm -rf .isobar

## Deploy

CONFIG ?= config
PLATFORMS ?=

.PHONY: images
images: tools ## push the programs' images to KO_DOCKER_REPO and write deploy/: CONFIG (config, config/adapters, …) with them
	@PATH="$(abspath .isobar/tools):$$PATH" PLATFORMS=$(PLATFORMS) config/images.sh $(CONFIG)

.PHONY: release
release: PLATFORMS := linux/amd64,linux/arm64
release: images ## make images, for amd64 and arm64

## Check

.PHONY: servers
servers: ## install the servers that the tests need
	@go run ./config/local/run -install

# One package at a time: those that start servers would take each other's cores.
.PHONY: test
test: servers ## run all tests, on real servers, with the race detector
	go test -race -p 1 -timeout 30m ./...

.PHONY: chaos
chaos: servers ## the long test: everything is killed in turn, nothing is lost or counted twice
	CHAOS=long go test -count 1 -timeout 2h -run TestChaos -v ./e2e

# What the configuration is made and checked with; its versions are part of what was tried.
.PHONY: tools
tools: ## put ko and kubeconform into .isobar/tools
	@GOBIN=$(abspath .isobar/tools) go install github.com/google/ko@v0.18.1
	@GOBIN=$(abspath .isobar/tools) go install github.com/yannh/kubeconform/cmd/kubeconform@v0.8.0

.PHONY: e2e
e2e: servers tools ## prove it on the cluster that KUBECONFIG names; RUN=... picks tests
	@PATH="$(abspath .isobar/tools):$$PATH" E2E=1 go test -count 1 -timeout 75m -v $(if $(RUN),-run '$(RUN)') ./e2e/knative

.PHONY: bench
bench: servers ## measure the speed, into bench.json
	go run ./bench

.PHONY: lint
lint: ## check Go, shell and the gRPC contract
	@files="$$($(GOFUMPT) -l .)"; if [[ -n "$$files" ]]; then echo "make fmt would change:"; echo "$$files"; exit 1; fi
	go vet ./...
	$(STATICCHECK) ./...
	$(GOLANGCI) run ./...
	shellcheck .ci/run config/*.sh config/load/*.sh eventing/*.sh proto/buf.sh
	proto/buf.sh lint

.PHONY: proto
proto: ## generate the code of the gRPC contract
	proto/buf.sh generate

.PHONY: fmt
fmt: ## write Go as gofumpt does
	$(GOFUMPT) -w .
