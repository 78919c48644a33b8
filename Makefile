# What a person runs here: make demo, make test. The rest is for those who
# change the program; "make help" lists it.
VERSION   ?= $(shell git describe --tags --match 'v*' --dirty 2>/dev/null | sed 's/^v//' | grep . || sed -n 's/^## \([0-9][0-9.]*\).*/\1/p' CHANGELOG.md | head -1)
GOFLAGS   := -trimpath
LDFLAGS   := -s -w -buildid= -X main.version=$(VERSION)
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOVULNCHECK := golang.org/x/vuln/cmd/govulncheck@v1.9.0

.PHONY: help build demo test test-vm test-matrix rpm lint bench fuzz clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' Makefile | expand -t 12

build: ## the program, as ./basicfw-agent
	CGO_ENABLED=0 go build $(GOFLAGS) -ldflags '$(LDFLAGS)' -o basicfw-agent ./cmd/basicfw-agent

demo: build ## first boot, status, a scan, a repair: in a throwaway network namespace
	test/install iproute2 iptables nmap python3
	test/demo ./basicfw-agent

test: ## all tests but those that boot a machine
	test/install iproute2 iptables nftables nmap procps docker.io containerd podman netavark rpm rpmlint cloud-init systemd openssh-server iputils-ping gpg gpg-agent groff-base man-db
	go test -count=1 -timeout 30m -skip '^TestFaults$$' ./...
	go test -count=1 -v -timeout 45m -run '^TestFaults$$' ./test/kernel

# What the boot tests need here. iptables and nftables are for the containers.
VM_TOOLS := iproute2 iptables nftables systemd-container mmdebstrap qemu-system-x86 qemu-utils e2fsprogs dosfstools openssh-client rpm cloud-init

test-vm: rpm ## boot tests: a virtual machine, cloud-init, the RPM, a reboot
	test/install $(VM_TOOLS)
	go test -count=1 -timeout 50m -tags vm -v -skip '^TestBoot$$/^debian-(11|13|sid)$$' ./test/vm/...

test-matrix: rpm ## the boot test on each Debian from 11 to sid, and without iptables
	test/install $(VM_TOOLS)
	go test -count=1 -timeout 150m -tags vm -v -run '^TestBoot$$' ./test/vm

rpm: ## RPMs for x86_64 and aarch64, in dist/
	packaging/rpm/build $(VERSION)

lint: ## gofmt, vet, staticcheck, govulncheck
	@test -z "$$(gofmt -l .)" || { gofmt -l .; exit 1; }
	go mod tidy -diff
	go vet ./... && go vet -tags vm ./test/vm/...
	go run $(STATICCHECK) -tags vm ./...
	@if curl -fsS -o /dev/null --max-time 20 https://vuln.go.dev/index/db.json 2>/dev/null; \
	then go run $(GOVULNCHECK) ./...; \
	else echo "govulncheck: its database cannot be reached from here; NOT checked"; fi

bench: build ## times and sizes beside the floor, in a throwaway network namespace
	test/install iproute2 iptables nftables
	go run ./test/bench ./basicfw-agent

fuzz: ## every fuzz target, for FUZZTIME (30s) each
	test/fuzz $(or $(FUZZTIME),30s)

clean: ## what was built here
	rm -rf basicfw-agent dist .cache
